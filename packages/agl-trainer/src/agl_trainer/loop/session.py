"""Opens the components of a training: store, policies, engines, gateway, collector and runner."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import agl
from agl.config import Config
from agl.runner.command import Addresses
from agl.runner.configured import configured_agent, configured_reward
from agl.runner.instrumentors import instrumented
from agl.runner.processes import RunnerProcesses
from agl.runner.runner import Runner
from agl.server_thread import ServerThread
from agl.store import Store, opened_store
from agl_trainer.loop.engines import serve_policies, token_of
from agl_trainer.loop.output_folder import claim_run
from agl_trainer.loop.policy_setup import open_policy
from agl_trainer.model.policies import Policies
from agl_trainer.rollout.queued_runner import QueuedRunner
from agl_trainer.rollout.serving import RolloutRunner, Serving, ShownProgress


@dataclass(frozen=True, slots=True)
class Session:
    """The components of an open training."""

    store: Store
    policies: Policies
    serving: Serving | None = None
    """None: it trains on rollouts of the store only."""
    page_url: str | None = None
    """Address of the page, while the session is open."""


@contextmanager
def open_session(
    config: Config, progress: ShownProgress | None = None, announce: Callable[[Store, str], None] = lambda *_: None
) -> Iterator[Session]:
    """Start all components on free loopback ports; agents find the gateway through `OPENAI_BASE_URL`.

    Before the model is loaded it calls `announce` with the store and the address of the page, which answers then.
    Raises AglError if the store, the model, the engine, or a function named in the configuration cannot be opened.
    """
    train = config.require_train()
    with ExitStack() as stack:
        store = stack.enter_context(opened_store(config.store_uri))
        policies, engine, server = stack.enter_context(
            serve_policies(config, store, progress, lambda server: announce(store, _page(server)))
        )
        addresses = Addresses(server.base_url, server.otlp_url, token_of(train))
        stack.enter_context(_environment(addresses.variables()))
        agl.init(endpoint=server.otlp_url, reward_weights=config.rewards)
        stack.callback(agl.shutdown)
        opened = _runners(config, store, addresses) if train.runners else _threads(config, store, addresses)
        runner = stack.enter_context(opened)
        yield Session(store, policies, Serving(engine, runner), _page(server))


def _page(server: ServerThread) -> str:
    return f"{server.base_url}/"


@contextmanager
def _threads(config: Config, store: Store, addresses: Addresses) -> Iterator[RolloutRunner]:
    """Agents in threads of this process."""
    train = config.require_train()
    agent, reward = configured_agent(train, addresses), configured_reward(train)
    with (
        instrumented(train.instrument),
        Runner(
            store,
            agent,
            reward=reward,
            reward_weights=config.rewards,
            concurrency=1 if train.deterministic else train.concurrency,
            timeout_s=train.timeout_s,
        ) as runner,
    ):
        yield runner


@contextmanager
def _runners(config: Config, store: Store, addresses: Addresses) -> Iterator[RolloutRunner]:
    """Agents in processes that this one starts, or that are started elsewhere."""
    train = config.require_train()
    folder = Path(train.output_dir).absolute()
    run = claim_run(folder, store)
    if train.runners == "external":
        start = f"agl runner CONFIG --store http://HOST:{train.port} --run {run}"
        yield QueuedRunner(store, train.unresponsive_s, lambda: None, start)
        return
    settings = folder / "runner.yaml"
    settings.write_text(config.to_yaml(), encoding="utf-8")
    options = {
        "--store": addresses.gateway,
        "--collector": addresses.collector,
        "--run": run,
        "--concurrency": str(math.ceil(train.concurrency / int(train.runners))),
        "--drain": "0s",
        "--patience": "1m",
    }
    command = [str(settings), *(part for option in options.items() for part in option)]
    with RunnerProcesses(command, int(train.runners), drain_s=0.0, log=folder / "runners.log") as processes:
        yield QueuedRunner(store, train.unresponsive_s, processes.check, f"agl runner {settings}")


@contextmanager
def open_store_session(config: Config) -> Iterator[Session]:
    """Open store and policies only, for training on rollouts of the store. Raises AglError."""
    with opened_store(config.store_uri) as store:
        yield Session(store, Policies([open_policy(config, base) for base in config.bases()]))


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
