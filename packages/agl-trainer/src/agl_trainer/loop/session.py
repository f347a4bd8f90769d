"""Opens the components of a training: store, policy, engine, gateway, collector and runner."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import agl
from agl.config import Config
from agl.runner.import_function import load_function
from agl.runner.instrumentors import instrumented
from agl.runner.runner import Runner
from agl.store import Store, opened_store
from agl_trainer.data.chat import ChatTemplate
from agl_trainer.loop.engines import serve_policy
from agl_trainer.loop.policy_setup import open_policy
from agl_trainer.model.policy import Policy
from agl_trainer.rollout.serving import Serving, ShownProgress


@dataclass(frozen=True, slots=True)
class Session:
    """The components of an open training."""

    store: Store
    policy: Policy
    template: ChatTemplate
    serving: Serving | None = None
    """None: it trains on rollouts of the store only."""
    page_url: str | None = None
    """Address of the page, while the session is open."""


@contextmanager
def open_session(config: Config, progress: ShownProgress | None = None) -> Iterator[Session]:
    """Start all components on free loopback ports; agents find the gateway through `OPENAI_BASE_URL`.

    Raises AglError if the store, the model, the engine, or a function named in the configuration cannot be opened.
    """
    train = config.require_train()
    agent = load_function(train.agent, "train.agent")
    reward = load_function(train.reward, "train.reward") if train.reward else None
    with ExitStack() as stack:
        store = stack.enter_context(opened_store(config.store_uri))
        policy, engine, server = stack.enter_context(serve_policy(config, store, progress))
        stack.enter_context(_environment(OPENAI_BASE_URL=f"{server.base_url}/v1", OPENAI_API_KEY="agl"))
        agl.init(endpoint=server.otlp_url, reward_weights=config.rewards)
        stack.callback(agl.shutdown)
        stack.enter_context(instrumented(train.instrument))
        runner = Runner(
            store,
            agent,
            reward=reward,
            reward_weights=config.rewards,
            concurrency=1 if train.deterministic else train.concurrency,
            timeout_s=train.timeout_s,
        )
        stack.enter_context(runner)
        yield Session(store, policy, ChatTemplate(policy.tokenizer), Serving(engine, runner), f"{server.base_url}/")


@contextmanager
def open_store_session(config: Config) -> Iterator[Session]:
    """Open store and policy only, for training on rollouts of the store. Raises AglError."""
    with opened_store(config.store_uri) as store:
        policy = open_policy(config)
        yield Session(store, policy, ChatTemplate(policy.tokenizer))


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
