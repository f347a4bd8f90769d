"""All that runs during a training: store, policy, engine, gateway, collector and the agents' runner."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import urllib3
from starlette.types import ASGIApp
from transformers.utils.logging import disable_progress_bar

import agl
from agl.config import Config, GatewayConfig, TrainConfig, UpstreamConfig
from agl.errors import ConfigError, TrainingError
from agl.gateway.engine import read_key
from agl.server_thread import ServerThread
from agl.store import Store, open_store
from agl_trainer.compute.devices import device_count
from agl_trainer.data.chat import ChatTemplate
from agl_trainer.engine.copied import CopiedEngine
from agl_trainer.engine.http.api import engine_app
from agl_trainer.engine.local.scheduler import Scheduler
from agl_trainer.engine.vllm.engine import VllmEngine
from agl_trainer.engine.vllm.server import VllmServer
from agl_trainer.model.base_model import check_sampled, check_trainable, load_model, model_folder, use_bfloat16_products
from agl_trainer.model.packing_probe import supports_packing
from agl_trainer.model.policy import Policy
from agl_trainer.model.tiny import build_tiny_model
from agl_trainer.rollout.import_function import load_function
from agl_trainer.rollout.instrumentors import instrumented
from agl_trainer.rollout.runner import Runner
from agl_trainer.rollout.serving import Serving, TrainingEngine

TINY, LOCAL = "tiny", "local"
_DRAIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Session:
    """The parts of a training that runs."""

    store: Store
    policy: Policy
    template: ChatTemplate
    serving: Serving | None = None
    """None: it trains on what the store holds."""


@contextmanager
def open_session(config: Config) -> Iterator[Session]:
    """Start everything on free loopback ports; the agents find the gateway by `OPENAI_BASE_URL`.

    Raises AglError for whatever cannot start: the store, the model, a function that the configuration names.
    """
    train = config.require_train()
    agent = load_function(train.agent, "train.agent")
    reward = load_function(train.reward, "train.reward") if train.reward else None
    with ExitStack() as stack:
        store = stack.enter_context(closing(open_store(config.store_uri)))
        open_serving = _serve_vllm if config.engine.kind == "vllm" else _serve_local
        policy, engine, server = stack.enter_context(open_serving(config, store))
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
        yield Session(store, policy, ChatTemplate(policy.tokenizer), Serving(engine, runner))


@contextmanager
def open_store_session(config: Config) -> Iterator[Session]:
    """Open store and model alone, for a training on what the store holds. Raises AglError."""
    with closing(open_store(config.store_uri)) as store:
        policy = open_policy(config)
        yield Session(store, policy, ChatTemplate(policy.tokenizer))


@contextmanager
def open_engine(config: Config) -> Iterator[tuple[Policy, Scheduler, ASGIApp]]:
    """The policy with fresh adapters, the scheduler that samples from it, and its OpenAI-compatible app."""
    train = config.require_train()
    policy = open_policy(config, samples=True)
    max_batch = 1 if train.deterministic else config.engine.max_batch
    with Scheduler(policy, max_batch=max_batch, max_model_len=config.engine.max_model_len) as scheduler:
        app = engine_app(
            scheduler,
            policy.tokenizer,
            served_name=policy.base_name,
            max_model_len=config.engine.max_model_len,
            default_max_tokens=train.max_tokens,
        )
        yield policy, scheduler, app


def open_policy(config: Config, *, samples: bool = False) -> Policy:
    """The base model with fresh adapters.

    Raises ConfigError for one that cannot be trained or, with `samples`, that the in-process engine cannot run.
    """
    train = config.require_train()
    disable_progress_bar()  # the line of `progress` is the only one that moves
    shards = _is_spread(train) and not samples
    model, tokenizer = load_model(base_folder(config), on_cpu=shards, in_4bit=train.load_in_4bit)
    check_trainable(model)
    packs = supports_packing(model)
    if samples:
        check_sampled(model.config, config.engine.max_model_len, packs=packs)
    if train.bf16:
        use_bfloat16_products(model)
    name = Path(train.model).name
    return Policy(
        model,
        tokenizer,
        config.agent_roles.roles,
        base_name=name,
        seed=train.seed,
        packs=packs,
        recomputes=train.gradient_checkpointing,
        compiles=train.compile,
        shards=shards,
    )


def _is_spread(train: TrainConfig) -> bool:
    """Whether the policy that trains lies on several devices."""
    return train.fsdp and device_count() > 1


@contextmanager
def _serve_local(config: Config, store: Store) -> Iterator[tuple[Policy, TrainingEngine, ServerThread]]:
    if config.gateway.upstream != LOCAL or config.gateway.engines:
        raise ConfigError(
            "gateway names an engine, but engine.kind is local: training updates the in-process engine. Leave "
            "gateway.upstream and gateway.engines out, or set `engine: vllm` if that is what they name"
        )
    train = config.require_train()
    if _is_spread(train) and not train.asynchronous:
        raise ConfigError(
            f"train.fsdp shards the policy across {device_count()} devices, so the in-process engine cannot sample "
            "from it; set `engine: {kind: vllm}`, or `train.asynchronous: true`, which gives the engine its own copy"
        )
    with open_engine(config) as (sampling, scheduler, app), _serve(config, config.gateway, store, app) as server:
        if train.asynchronous:
            policy = open_policy(config)
            yield policy, CopiedEngine(policy, sampling, scheduler), server
        else:
            yield sampling, scheduler, server


@contextmanager
def _serve_vllm(config: Config, store: Store) -> Iterator[tuple[Policy, TrainingEngine, ServerThread]]:
    train = config.require_train()
    engines = config.gateway.engines or [UpstreamConfig(url=config.gateway.upstream)]
    gateway = config.gateway.model_copy(update={"engines": engines})
    with ExitStack() as stack:
        servers = [stack.enter_context(VllmServer(engine.url, read_key(engine))) for engine in engines]
        policy = open_policy(config)
        server = stack.enter_context(_serve(config, gateway, store, None))
        folder = Path(train.output_dir) / "adapters"
        route = functools.partial(_route, server.base_url)
        yield policy, VllmEngine(servers, policy, folder, tolerance=config.engine.tolerance, route=route), server


def load_list(reference: str | None, key: str) -> list[Any]:
    """The non-empty list that the function `reference` returns. Raises ConfigError naming `key` otherwise."""
    function: Callable[[], Any] = load_function(reference, key)
    items = function()
    if not isinstance(items, list) or not items:
        raise ConfigError(f"{key}: {reference} returned {type(items).__name__}, expected a non-empty list")
    return items


def _serve(config: Config, gateway: GatewayConfig, store: Store, app: ASGIApp | None) -> ServerThread:
    train = config.require_train()
    overrides = {"train": {"temperature": train.temperature}, "eval": {"temperature": train.eval_temperature}}
    return ServerThread(store, port=0, otlp_http_port=0, upstream=app, gateway=gateway, overrides=overrides)


def _route(gateway: str, role: str, name: str) -> None:
    """Have calls to `role` answered by `name` from here on. Waits for those under way, which the version before
    answers; what arrives meanwhile is asked to come again.
    """

    def ask(method: str, path: str, body: Mapping[str, Any]) -> None:
        response = urllib3.request(method, f"{gateway}/api/gateway{path}", json=body, timeout=_DRAIN_S + 10)
        if response.status != HTTPStatus.OK:
            raise TrainingError(f"the gateway refused {path}: {response.status} {response.data.decode()}")

    ask("POST", "/pause", {"drain_s": _DRAIN_S})
    try:
        ask("PUT", f"/models/{role}", {"model": name})
    finally:
        ask("POST", "/resume", {})


def base_folder(config: Config) -> Path:
    """The folder of `train.model`; a tiny one is built where it is not there yet. Raises ConfigError."""
    train = config.require_train()
    if train.model != TINY:
        return model_folder(train.model)
    folder = Path(train.output_dir) / "model"
    if not folder.exists():
        build_tiny_model(folder, _texts(config, train), train.seed)
    return folder


def _texts(config: Config, train: TrainConfig) -> Iterator[str]:
    """Every string in tasks and examples: what a tokenizer of their own learns from."""
    if train.tasks is not None or config.sft is None:
        yield from _strings(load_list(train.tasks, "train.tasks"))
    if config.sft is not None and config.sft.examples is not None:
        yield from _strings(load_list(config.sft.examples, "sft.examples"))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


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
