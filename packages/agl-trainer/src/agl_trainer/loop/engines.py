"""Opens the engine that samples the rollouts of a training, behind a gateway: in this process, or vLLM servers."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from http import HTTPStatus
from pathlib import Path
from typing import Any

import urllib3
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from agl.config import Config, GatewayConfig, LaunchConfig, TrainConfig, UpstreamConfig
from agl.config.collector import TOKEN_VARIABLE
from agl.errors import ConfigError, TrainingError
from agl.secret_url import SecretUrl
from agl.server.auth import BearerTokens, is_loopback
from agl.server_thread import ServerThread
from agl.store import Store
from agl_trainer.compute.devices import device_count
from agl_trainer.engine.copied import CopiedEngine
from agl_trainer.engine.http.api import engine_app
from agl_trainer.engine.local.scheduler import Scheduler
from agl_trainer.engine.vllm.engine import VllmEngine
from agl_trainer.engine.vllm.launch import RunningVllm, free_port, running_vllm, serve_command
from agl_trainer.engine.vllm.server import VllmServer
from agl_trainer.loop.policy_setup import base_folder, base_name, is_sharded, open_policy
from agl_trainer.model.device import release_memory
from agl_trainer.model.policy import Policy
from agl_trainer.rollout.serving import ShownProgress, TrainingEngine

LOCAL = "local"
"""`gateway.upstream` of the in-process engine."""
_SERVED = "served"
"""Folder of the versions that vLLM loads, one per step. Not that of published adapters, of which the newest counts."""
_DRAIN_S, _ROUTE_S = 60.0, 10.0
"""Longest wait until running calls have ended, and timeout of a request to the training's own gateway."""


class LateApp:
    """The app of an engine whose model may still be loading: until then requests are to come again."""

    def __init__(self) -> None:
        self._app: Future[ASGIApp] = Future()

    def open(self, app: ASGIApp) -> None:
        self._app.set_result(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # The server waits for this before it answers anything.
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
        elif self._app.done():
            await self._app.result()(scope, receive, send)
        else:
            response = PlainTextResponse("the model is loading", HTTPStatus.SERVICE_UNAVAILABLE, {"retry-after": "1"})
            await response(scope, receive, send)


OpenedEngine = tuple[Policy, TrainingEngine, ServerThread]
Announce = Callable[[ServerThread], None]


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


def serve_policy(
    config: Config, store: Store, progress: ShownProgress | None, announce: Announce
) -> AbstractContextManager[OpenedEngine]:
    """The policy, the engine that samples from it, and the server with gateway and collector.

    The server answers from the call of `announce` on, before the model is loaded.
    """
    if config.engine.kind == "vllm":
        return _serve_vllm(config, store, progress, announce)
    return _serve_local(config, store, announce)


@contextmanager
def _serve_local(config: Config, store: Store, announce: Announce) -> Iterator[OpenedEngine]:
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
    late = LateApp()
    with _server(config, config.gateway, store, late) as server, ExitStack() as stack:
        announce(server)
        # Closed before the server, which would wait for the calls that are being sampled.
        sampling, scheduler, app = stack.enter_context(open_engine(config))
        late.open(app)
        if train.asynchronous:
            policy = open_policy(config)
            yield policy, CopiedEngine(policy, sampling, scheduler), server
        else:
            yield sampling, scheduler, server


@contextmanager
def _serve_vllm(
    config: Config, store: Store, progress: ShownProgress | None, announce: Announce
) -> Iterator[OpenedEngine]:
    train, launch = config.require_train(), config.engine.launch
    with ExitStack() as stack:
        vllm = stack.enter_context(_launched(config, launch, progress)) if launch else None
        if vllm is not None:
            url = SecretUrl(vllm.url)
        elif config.gateway.upstream == LOCAL and not config.gateway.engines:
            raise ConfigError(
                "engine.kind is vllm, but no server is named: set gateway.upstream to its URL, or engine.launch to "
                "start one"
            )
        else:
            url = config.gateway.upstream
        engines = config.gateway.engines or [UpstreamConfig(url=url)]
        gateway = config.gateway.model_copy(update={"engines": engines})
        servers = [stack.enter_context(VllmServer(engine.base_url, engine.authorization())) for engine in engines]
        server = stack.enter_context(_server(config, gateway, store, None))
        announce(server)
        policy = open_policy(config)
        engine = VllmEngine(
            servers,
            policy,
            Path(train.output_dir).absolute() / _SERVED,
            tolerance=config.engine.tolerance,
            route=functools.partial(_route, server.base_url),
            pause=functools.partial(_asleep, server.base_url, servers) if launch and launch.sleep else nullcontext,
            check=vllm.check if vllm else lambda: None,
        )
        yield policy, engine, server


@contextmanager
def _launched(config: Config, launch: LaunchConfig, progress: ShownProgress | None) -> Iterator[RunningVllm]:
    """A vLLM server of the base model, which runs within the context."""
    train, port = config.require_train(), launch.port or free_port()
    command = serve_command(
        launch,
        base_folder(config),
        base_name(train),
        port=port,
        max_model_len=config.engine.max_model_len,
        ranks=[role.lora_r for role in config.require_roles().values() if role.adapter is None],
        versions=(train.max_staleness or 0) + 2,
        chat_template=train.chat_template,
    )
    log = Path(train.output_dir).absolute() / "vllm.log"  # An agent may change the current folder.

    def show(waiting_for: str | None) -> None:
        if progress is not None:
            progress.update(waiting_for=waiting_for)

    shown = functools.partial(show, f"vLLM to load the model (its log is {log})")
    with running_vllm(command, launch, port, log, shown) as vllm:
        show(None)
        yield vllm


def _server(config: Config, gateway: GatewayConfig, store: Store, app: ASGIApp | None) -> ServerThread:
    train = config.require_train()
    sampling = {"temperature": train.temperature} | train.sampling.settings()
    overrides = {"train": sampling, "eval": {"temperature": train.eval_temperature}}
    return ServerThread(
        store,
        host=train.host,
        port=train.port,
        otlp_http_port=train.otlp_http_port,
        tokens=BearerTokens.read(token_of(train) or None, None),
        upstream=app,
        gateway=gateway,
        overrides=overrides,
        allowed_hosts=config.server.allowed_hosts,
    )


def token_of(train: TrainConfig) -> str:
    """The token that the servers of the training ask for; empty on loopback, where they ask for none.

    Raises ConfigError if others can reach them and the environment has no token.
    """
    if is_loopback(train.host):
        return ""
    if token := os.environ.get(TOKEN_VARIABLE, "").strip():
        return token
    raise ConfigError(f"others can reach train.host {train.host}: set {TOKEN_VARIABLE} to a secret, also for runners")


def _route(gateway: str, versions: Mapping[str, str]) -> None:
    """Route the calls of later rollouts to `versions`, by role; running ones stay on theirs."""
    _control(gateway, "PATCH", "versions", {"versions": dict(versions)})


@contextmanager
def _asleep(gateway: str, servers: Sequence[VllmServer]) -> Iterator[None]:
    """Context in which `servers` hold no memory of the GPU, which the trainer uses; calls are asked to come again."""
    _control(gateway, "POST", "pause", {"drain_s": _DRAIN_S})
    for server in servers:
        server.sleep()
    try:
        yield
    finally:
        release_memory()
        for server in servers:
            server.wake_up()
        _control(gateway, "POST", "resume", {})


def _control(gateway: str, method: str, path: str, body: Mapping[str, Any]) -> None:
    headers = {"authorization": f"Bearer {os.environ.get(TOKEN_VARIABLE, '')}"}
    url, timeout_s = f"{gateway}/api/gateway/{path}", _DRAIN_S + _ROUTE_S
    response = urllib3.request(method, url, json=body, headers=headers, timeout=timeout_s)
    if response.status != HTTPStatus.OK:
        raise TrainingError(f"the gateway refused {path} {body}: {response.status} {response.data.decode()}")
