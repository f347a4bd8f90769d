"""Opens the engine that samples the rollouts of a training, behind a gateway: in this process, or vLLM servers."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import urllib3
from starlette.types import ASGIApp

from agl.config import Config, GatewayConfig, UpstreamConfig
from agl.errors import ConfigError, TrainingError
from agl.server_thread import ServerThread
from agl.store import Store
from agl_trainer.compute.devices import device_count
from agl_trainer.engine.copied import CopiedEngine
from agl_trainer.engine.http.api import engine_app
from agl_trainer.engine.local.scheduler import Scheduler
from agl_trainer.engine.vllm.engine import VllmEngine
from agl_trainer.engine.vllm.server import VllmServer
from agl_trainer.loop.policy_setup import is_sharded, open_policy
from agl_trainer.model.policy import Policy
from agl_trainer.rollout.serving import TrainingEngine

LOCAL = "local"
"""`gateway.upstream` of the in-process engine."""
_DRAIN_S = 60.0

OpenedEngine = tuple[Policy, TrainingEngine, ServerThread]


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


def serve_policy(config: Config, store: Store) -> AbstractContextManager[OpenedEngine]:
    """The policy, the engine that samples from it, and the server with gateway and collector."""
    return _serve_vllm(config, store) if config.engine.kind == "vllm" else _serve_local(config, store)


@contextmanager
def _serve_local(config: Config, store: Store) -> Iterator[OpenedEngine]:
    if config.gateway.upstream != LOCAL or config.gateway.engines:
        raise ConfigError(
            "gateway names an engine, but engine.kind is local: training updates the in-process engine. Remove "
            "gateway.upstream and gateway.engines, or set `engine: vllm` if they name vLLM servers"
        )
    train = config.require_train()
    if is_sharded(train) and not train.asynchronous:
        raise ConfigError(
            f"train.fsdp shards the policy across {device_count()} devices, so the in-process engine cannot sample "
            "from it; set `engine: {kind: vllm}`, or `train.asynchronous: true`, which gives the engine its own copy"
        )
    with (
        open_engine(config) as (sampling, scheduler, app),
        _server(config, config.gateway, store, app) as server,
        closing(scheduler),  # before the server, which would wait for the calls that are being sampled
    ):
        if train.asynchronous:
            policy = open_policy(config)
            yield policy, CopiedEngine(policy, sampling, scheduler), server
        else:
            yield sampling, scheduler, server


@contextmanager
def _serve_vllm(config: Config, store: Store) -> Iterator[OpenedEngine]:
    train = config.require_train()
    engines = config.gateway.engines or [UpstreamConfig(url=config.gateway.upstream)]
    gateway = config.gateway.model_copy(update={"engines": engines})
    with ExitStack() as stack:
        servers = [stack.enter_context(VllmServer(engine.base_url, engine.authorization())) for engine in engines]
        policy = open_policy(config)
        server = stack.enter_context(_server(config, gateway, store, None))
        folder = Path(train.output_dir) / "adapters"
        route = functools.partial(_route, server.base_url)
        yield policy, VllmEngine(servers, policy, folder, tolerance=config.engine.tolerance, route=route), server


def _server(config: Config, gateway: GatewayConfig, store: Store, app: ASGIApp | None) -> ServerThread:
    train = config.require_train()
    sampling = {"temperature": train.temperature} | train.sampling.settings()
    overrides = {"train": sampling, "eval": {"temperature": train.eval_temperature}}
    return ServerThread(store, port=0, otlp_http_port=0, upstream=app, gateway=gateway, overrides=overrides)


def _route(gateway: str, role: str, name: str) -> None:
    """Route later calls of `role` to the version `name`.

    Waits until the previous version has answered the calls in flight; the gateway asks clients of new ones to retry.
    """

    def call(method: str, path: str, body: Mapping[str, Any]) -> None:
        response = urllib3.request(method, f"{gateway}/api/gateway{path}", json=body, timeout=_DRAIN_S + 10)
        if response.status != HTTPStatus.OK:
            raise TrainingError(f"the gateway refused {path}: {response.status} {response.data.decode()}")

    call("POST", "/pause", {"drain_s": _DRAIN_S})
    try:
        call("PUT", f"/models/{role}", {"model": name})
    finally:
        call("POST", "/resume", {})
