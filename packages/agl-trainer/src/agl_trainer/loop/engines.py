"""Opens the engines that sample the rollouts of a training, behind a gateway: in this process, or vLLM servers."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

import urllib3
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from agl.config import Base, Config, GatewayConfig, LaunchConfig, TrainConfig, UpstreamConfig
from agl.config.collector import TOKEN_VARIABLE
from agl.errors import ConfigError, TrainingError
from agl.secret_url import SecretUrl
from agl.server.auth import BearerTokens, is_loopback
from agl.server_thread import EngineApp, ServerThread
from agl.store import Store
from agl_trainer.compute.devices import device_count
from agl_trainer.engine.copied import CopiedEngine
from agl_trainer.engine.http.api import engine_app
from agl_trainer.engine.local.scheduler import Scheduler
from agl_trainer.engine.vllm.engine import VllmEngine
from agl_trainer.engine.vllm.fleet import Fleet
from agl_trainer.engine.vllm.launch import RunningVllm, free_port, running_vllm, serve_command, url_of
from agl_trainer.engine.vllm.registry import Wanted, fleet_name
from agl_trainer.engine.vllm.remote import RemoteEngine
from agl_trainer.engine.vllm.server import VllmServer
from agl_trainer.loop.output_folder import claim_run
from agl_trainer.loop.policy_setup import base_folder, is_sharded, open_policy
from agl_trainer.model.device import release_memory
from agl_trainer.model.fingerprint import fingerprint
from agl_trainer.model.policies import Policies
from agl_trainer.model.policy import Policy
from agl_trainer.rollout.engines import Engines
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


OpenedEngine = tuple[Policies, TrainingEngine, ServerThread]
Announce = Callable[[ServerThread], None]


@contextmanager
def open_engine(config: Config, base: Base) -> Iterator[tuple[Policy, Scheduler, ASGIApp]]:
    """The policy of `base` with fresh adapters, the scheduler that samples from it, and its OpenAI-compatible app."""
    train, longest = config.require_train(), base.engine.max_model_len
    policy = open_policy(config, base, samples=True)
    max_batch = 1 if train.deterministic else base.engine.max_batch
    with Scheduler(policy, max_batch=max_batch, max_model_len=longest) as scheduler:
        app = engine_app(
            scheduler,
            policy.tokenizer,
            served_name=policy.base_name,
            max_model_len=longest,
            default_max_tokens=train.max_tokens,
        )
        yield policy, scheduler, app


@contextmanager
def serve_policies(
    config: Config, store: Store, progress: ShownProgress | None, announce: Announce
) -> Iterator[OpenedEngine]:
    """The policies, the engines that sample from them, and the server with gateway and collector.

    The server answers from the call of `announce` on, before any model is loaded.
    """
    with ExitStack() as stack:
        planned = [_planned(config, base, store) for base in config.bases()]
        apps = [EngineApp(one.app, one.base.served) for one in planned if isinstance(one, _Local)]
        servers = [server for one in planned if isinstance(one, _Vllm) for server in one.servers]
        gateway = config.gateway.model_copy(update={"engines": servers})
        server = stack.enter_context(_server(config, gateway, store, apps))
        announce(server)
        # All before the first policy: vLLM measures the memory that is free on the GPU.
        running = [stack.enter_context(one.running(progress)) for one in planned]
        # Closed before the server, which would wait for the calls that are being sampled.
        opened = [stack.enter_context(one.opened(server)) for one in running]
        sleeps = any(one.base.engine.launch and one.base.engine.launch.sleep for one in planned)
        pause = functools.partial(_paused, server.base_url) if sleeps else nullcontext
        yield Policies([policy for policy, _ in opened]), Engines([engine for _, engine in opened], pause), server


def _planned(config: Config, base: Base, store: Store) -> "_Local | _Vllm | _Remote":
    """The engine of `base` before it runs. Raises ConfigError."""
    if base.engine.kind == "remote":
        return _Remote(config, base, store, base.engine.key())
    if base.engine.kind == "local":
        _check_local(config, base)
        return _Local(config, base, LateApp())
    listed, launch = config.servers_of(base), base.engine.launch
    if launch is not None:
        port = launch.port or free_port()
        return _Vllm(config, base, [UpstreamConfig(url=SecretUrl(url_of(port)), models=[*base.served])], port)
    if listed or config.gateway.upstream != LOCAL:
        return _Vllm(config, base, listed or [UpstreamConfig(url=config.gateway.upstream)])
    where = f"list it in gateway.engines with models: [{base.name}]" if base.is_one_of else "set gateway.upstream"
    raise ConfigError(
        f"{base.engine_key}.kind is vllm, but no server is named: {where} to its URL, or {base.engine_key}.launch "
        "to start one"
    )


def _check_local(config: Config, base: Base) -> None:
    """Raises ConfigError if the engine of this process cannot sample for the training."""
    train = config.require_train()
    if config.gateway.upstream != LOCAL or config.servers_of(base):
        raise ConfigError(
            f"gateway names an engine, but {base.engine_key}.kind is local: training updates the in-process engine. "
            "Remove gateway.upstream and gateway.engines, or set `engine: vllm` if they name vLLM servers"
        )
    if is_sharded(train) and not train.asynchronous:
        raise ConfigError(
            f"train.fsdp shards the policy across {device_count()} devices, so the in-process engine cannot sample "
            "from it; set `engine: {kind: vllm}`, or `train.asynchronous: true`, which gives the engine its own copy"
        )


@dataclass(frozen=True, slots=True)
class _Local:
    """The engine of this process for `base`, which answers once it is opened."""

    config: Config
    base: Base
    app: LateApp

    def running(self, _: ShownProgress | None) -> AbstractContextManager[Self]:
        return nullcontext(self)

    @contextmanager
    def opened(self, _: ServerThread) -> Iterator[tuple[Policy, TrainingEngine]]:
        with open_engine(self.config, self.base) as (sampling, scheduler, app):
            self.app.open(app)
            if self.config.require_train().asynchronous:
                policy = open_policy(self.config, self.base)
                yield policy, CopiedEngine(policy, sampling, scheduler)
            else:
                yield sampling, scheduler


@dataclass(frozen=True, slots=True)
class _Vllm:
    """vLLM servers with `base`."""

    config: Config
    base: Base
    servers: list[UpstreamConfig]
    port: int | None = None
    """Of the server that the training launches; None: they run already."""
    check: Callable[[], None] = lambda: None
    """Raises TrainingError if one has ended for good."""

    @contextmanager
    def running(self, progress: ShownProgress | None) -> Iterator[Self]:
        """Launches the server, if it is this training's. Raises ConfigError and TrainingError if that fails."""
        launch = self.base.engine.launch
        if launch is None or self.port is None:
            yield self
            return
        with _launched(self.config, self.base, launch, self.port, progress) as vllm:
            yield replace(self, check=vllm.check)

    @contextmanager
    def opened(self, server: ServerThread) -> Iterator[tuple[Policy, TrainingEngine]]:
        train, launch = self.config.require_train(), self.base.engine.launch
        with ExitStack() as stack:
            servers = [stack.enter_context(VllmServer(one.base_url, one.authorization())) for one in self.servers]
            policy = open_policy(self.config, self.base)
            engine = VllmEngine(
                servers,
                policy,
                Path(train.output_dir).absolute() / _SERVED,
                tolerance=self.base.engine.tolerance,
                route=functools.partial(_route, server.base_url),
                pause=functools.partial(_asleep, servers) if launch and launch.sleep else nullcontext,
                check=self.check,
            )
            yield policy, engine


@dataclass(frozen=True, slots=True)
class _Remote:
    """vLLM servers with `base` on other machines, which register in `store` once the training's server answers."""

    config: Config
    base: Base
    store: Store
    key: str
    """Of the engines; empty: none."""
    progress: ShownProgress | None = None

    def running(self, progress: ShownProgress | None) -> AbstractContextManager[Self]:
        return nullcontext(replace(self, progress=progress))

    @contextmanager
    def opened(self, server: ServerThread) -> Iterator[tuple[Policy, TrainingEngine]]:
        """Waits until an engine has registered."""
        engine, folder = self.base.engine, Path(self.config.require_train().output_dir).absolute()
        policy = open_policy(self.config, self.base)
        base = fingerprint(base_folder(self.config, self.base), policy.tokenizer)
        run = claim_run(folder, self.store)

        def use(url: str) -> None:
            served = UpstreamConfig(url=SecretUrl(url), key_env=engine.key_env, models=[*self.base.served])
            server.gateway.add_engine(served)

        def show(waits: bool) -> None:
            if self.progress is not None:
                model = f" --model {self.base.name}" if self.base.is_one_of else ""
                start = f"agl engine CONFIG --store {server.base_url} --run {run}{model}"
                self.progress.update(waiting_for=f"an engine: {start}" if waits else None)

        with Fleet(
            self.store,
            fleet_name(run, self.base),
            Wanted(base=base, roles=tuple(policy.roles)),
            lease_s=engine.lease_s,
            headers={"authorization": f"Bearer {self.key}"} if self.key else {},
            on_use=use,
            on_drop=server.gateway.remove_engine,
        ) as fleet:
            route = functools.partial(_route, server.base_url)
            served = folder / _SERVED
            yield policy, RemoteEngine(fleet, policy, served, tolerance=engine.tolerance, route=route, on_wait=show)


@contextmanager
def _launched(
    config: Config, base: Base, launch: LaunchConfig, port: int, progress: ShownProgress | None
) -> Iterator[RunningVllm]:
    """A vLLM server of `base`, which runs within the context."""
    command = vllm_command(config, base, launch, port)
    folder = Path(config.require_train().output_dir).absolute()  # An agent may change the current folder.
    log = folder / f"{base.prefix}vllm.log"

    def show(waiting_for: str | None) -> None:
        if progress is not None:
            progress.update(waiting_for=waiting_for)

    shown = functools.partial(show, f"vLLM to load the model (its log is {log})")
    with running_vllm(command, launch, port, log, shown) as vllm:
        show(None)
        yield vllm


def vllm_command(config: Config, base: Base, launch: LaunchConfig, port: int, host: str = "127.0.0.1") -> list[str]:
    """`vllm serve` with what the training needs on `base`. Raises ConfigError."""
    return serve_command(
        launch,
        base_folder(config, base),
        base.name,
        port=port,
        host=host,
        max_model_len=base.engine.max_model_len,
        ranks=[role.lora_r for role in base.roles.values() if role.adapter is None],
        versions=(config.require_train().max_staleness or 0) + 2,
        chat_template=base.chat_template,
    )


def _server(config: Config, gateway: GatewayConfig, store: Store, apps: Sequence[EngineApp]) -> ServerThread:
    train = config.require_train()
    sampling = {"temperature": train.temperature} | train.sampling.settings()
    overrides = {"train": sampling, "eval": {"temperature": train.eval_temperature}}
    return ServerThread(
        store,
        host=train.host,
        port=train.port,
        otlp_http_port=train.otlp_http_port,
        tokens=BearerTokens.read(token_of(train) or None, None),
        upstream=apps,
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
def _paused(gateway: str) -> Iterator[None]:
    """Context in which no call runs: calls are asked to come again."""
    _control(gateway, "POST", "pause", {"drain_s": _DRAIN_S})
    try:
        yield
    finally:
        _control(gateway, "POST", "resume", {})


@contextmanager
def _asleep(servers: Sequence[VllmServer]) -> Iterator[None]:
    """Context in which `servers`, which have no calls, hold no memory of the GPU, which the trainer uses."""
    for server in servers:
        server.sleep()
    try:
        yield
    finally:
        release_memory()
        for server in servers:
            server.wake_up()


def _control(gateway: str, method: str, path: str, body: Mapping[str, Any]) -> None:
    headers = {"authorization": f"Bearer {os.environ.get(TOKEN_VARIABLE, '')}"}
    url, timeout_s = f"{gateway}/api/gateway/{path}", _DRAIN_S + _ROUTE_S
    response = urllib3.request(method, url, json=body, headers=headers, timeout=timeout_s)
    if response.status != HTTPStatus.OK:
        raise TrainingError(f"the gateway refused {path} {body}: {response.status} {response.data.decode()}")
