"""Assembles the servers of `agl serve`: gateway, API and page on one port, the OTLP receivers on two more."""

import asyncio
import secrets
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from agl.collector import GrpcReceiver, HttpReceiver, Receiver
from agl.config import CollectorConfig, GatewayConfig, TlsConfig, UpstreamConfig
from agl.errors import AglError, ConfigError
from agl.gateway import Gateway
from agl.page.metrics import TEXT, Numbers, render, training_metrics
from agl.page.site import Page
from agl.secret_url import SecretUrl
from agl.server.app_thread import GRACE_S, AppThread, base_url, listen
from agl.server.auth import HEALTH, AllowedHosts, AuthMiddleware, BearerTokens, is_loopback
from agl.server.receiving import BodyMiddleware, MemoryBudget
from agl.store import Store, opened_projects
from agl.store.http.routes import StoreApi
from agl.store.traffic import intake_of

if TYPE_CHECKING:
    from agl.queue import SpanQueue

_COUNT_S: Final = 1.5
_RATE_S: Final = 60.0
_GROWTH: Final = 4
"""Limit of a request to the in-process engine, as a multiple of the client's: the gateway escapes text and adds ids."""
_QUEUE_LENGTH: Final = "Spans that are acknowledged and wait in the queue for the store."
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class EngineApp:
    """An engine of this process."""

    app: ASGIApp
    models: tuple[str, ...] = ()
    """Names that it answers, as `gateway.engines.models`; empty: all."""


class ServerThread(AppThread):
    """Serves gateway, API and page at `base_url`, the OTLP receivers at `otlp_url` and `otlp_grpc_url`.

    `upstream` is the engine: its base URL ending in `/v1`, or an ASGI app, which is then served on a free port; or
    several apps, beside the engines of `gateway`. Without it the engines are those of `gateway`; if there are none,
    calls are rejected. Port 0 is any free port; without `otlp_grpc_port` there is no gRPC receiver.
    With a `queue` the receivers append spans to it, for its writers to move to `store`, and `/metrics` reports its
    length. With `tokens` every request except `/api/health` needs a token that has the right to it, and has to do with
    the rollouts of the token's project only: `store` is that of the default project, `stores` has all. Every request
    must name loopback, `host` or one of `allowed_hosts` as its host.
    With `samples` production spans wait in their store for the decision of sampling.
    Raises AglError naming a port in use; ConfigError if others reach `host` without token or engines are named twice.
    """

    otlp_grpc_url: str | None = None

    def __init__(
        self,
        store: Store,
        *,
        host: str = "127.0.0.1",
        port: int = 8400,
        otlp_http_port: int = 4318,
        otlp_grpc_port: int | None = None,
        tokens: BearerTokens | None = None,
        upstream: str | ASGIApp | Sequence[EngineApp] | None = None,
        collector: CollectorConfig | None = None,
        queue: "SpanQueue | None" = None,
        gateway: GatewayConfig | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        allowed_hosts: Collection[str] = (),
        samples: bool = False,
    ) -> None:
        super().__init__()
        if not tokens and not is_loopback(host):
            raise ConfigError(f"others can reach {host}: pass --token, or listen on 127.0.0.1")
        self._opened = ExitStack()
        self.stores = self._opened.enter_context(opened_projects(store, tokens.projects if tokens else ()))
        intakes = {name: intake_of(each) if samples else each for name, each in self.stores.items()}
        sinks = {name: queue.of_project(name) if queue else each for name, each in intakes.items()}
        receiver = Receiver(sinks, collector, tokens)
        self._http = HttpReceiver(receiver)
        self._api = StoreApi(self.stores, receiver.config)
        hosts = AllowedHosts(host, allowed_hosts)
        self._grpc = GrpcReceiver(receiver, hosts) if otlp_grpc_port is not None else None
        try:
            config = self._with_engines(gateway or GatewayConfig(), upstream, guarded=bool(tokens))
            self.gateway = Gateway(self.stores, config, overrides=overrides, intakes=intakes)
            running = _Running(store, self.gateway, receiver, queue)
            page = Page(self.stores, tokens or BearerTokens(), running)
            routes = [*self._api.routes(), Route(HEALTH, running.show)]
            routes.append(Route("/metrics", running.metrics))
            routes += page.routes()
            api = AuthMiddleware(self.gateway.app(routes), tokens or BearerTokens())
            send_s = config.timeouts.send_s
            shared: dict[str, Any] = {"host": host, "hosts": hosts}
            self.base_url = self.add(api, port=port, name="gateway", tls=config.tls, send_s=send_s, **shared)
            tls = receiver.config.tls
            self.otlp_url = self.add(self._http, port=otlp_http_port, name="OTLP/HTTP receiver", tls=tls, **shared)
            if self._grpc is not None and otlp_grpc_port is not None:
                self.otlp_grpc_url = _bind(self._grpc, host, otlp_grpc_port, tls)
        except AglError:
            self.stop()
            raise

    def start(self) -> None:
        super().start()
        if self._grpc is not None:
            self._grpc.start()

    def stop(self) -> None:
        if self._grpc is not None:
            self._grpc.stop(GRACE_S)
        super().stop()
        self._http.close()
        self._api.close()
        self._opened.close()

    def _with_engines(
        self, config: GatewayConfig, upstream: str | ASGIApp | Sequence[EngineApp] | None, guarded: bool
    ) -> GatewayConfig:
        """`config` with `upstream`, if given, among its engines; an app, if `guarded`, answers the gateway only."""
        if upstream is None:
            return config
        if isinstance(upstream, str):
            engines = [UpstreamConfig(url=SecretUrl(upstream))]
        else:
            apps = upstream if isinstance(upstream, Sequence) else [EngineApp(upstream)]
            engines = [self._add_engine(one, config, guarded) for one in apps]
        if config.engines and not all(engine.models for engine in engines):
            raise ConfigError("gateway.engines lists engines, and this command brings its own: remove the list")
        return config.model_copy(update={"engines": [*config.engines, *engines]})

    def _add_engine(self, engine: EngineApp, config: GatewayConfig, guarded: bool) -> UpstreamConfig:
        login = f"agl:{secrets.token_hex(16)}" if guarded else ""
        url = self.add(_guard(engine.app, config, login), name="engine")  # On loopback whatever `host` is.
        url = url.replace("://", f"://{login}@") if login else url
        return UpstreamConfig(url=SecretUrl(f"{url}/v1"), kind="agl", models=[*engine.models])


def _guard(app: ASGIApp, config: GatewayConfig, login: str) -> ASGIApp:
    """The engine `app`, within limits, for requests with `login` as Basic authentication, if it is not empty."""
    budget = MemoryBudget(_GROWTH * config.max_pending_bytes, _GROWTH * config.max_body_bytes, "gateway")
    tokens = BearerTokens([b64encode(login.encode()).decode()] if login else (), scheme=b"basic")
    return AuthMiddleware(BodyMiddleware(app, budget), tokens)


def _bind(receiver: GrpcReceiver, host: str, port: int, tls: TlsConfig | None) -> str:
    listen(host, port, "OTLP/gRPC receiver").close()  # gRPC would not report why it cannot.
    return base_url(host, receiver.bind(host, port), tls)


class IngestRate:
    """Spans per second that the store took up between the requests of the last minute, whoever wrote them."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def of(self, spans: int, now_s: float) -> float | None:
        """The rate, now that the store has `spans`; None until there are two requests, a second apart."""
        while self._seen and self._seen[0][0] < now_s - _RATE_S:
            self._seen.popleft()
        self._seen.append((now_s, spans))
        first_s, before = self._seen[0]
        # `gc` may have deleted more than was written.
        return max(spans - before, 0) / (now_s - first_s) if now_s - first_s >= 1 else None


@dataclass(frozen=True, slots=True)
class _Running:
    """The server's state, for its API and its page."""

    store: Store
    gateway: Gateway
    receiver: Receiver
    queue: "SpanQueue | None"
    rate: IngestRate = field(default_factory=IngestRate)

    async def health(self) -> dict[str, Any]:
        spans, engines, length = await asyncio.gather(
            _soon(self.store.count_spans),
            self.gateway.engine_states(),
            _soon(self.queue.length) if self.queue else _nothing(),
        )
        rate = None if spans is None else self.rate.of(spans, time.monotonic())
        found = {"spans": spans, "spans_per_s": rate, "engines": engines}
        return found | ({"span_queue_length": length} if self.queue else {})

    def live_versions(self) -> Mapping[str, str]:
        return self.gateway.live_versions

    async def show(self, _: Request) -> JSONResponse:
        return JSONResponse(await self.health())

    async def metrics(self, _: Request) -> Response:
        spans, length, training = await asyncio.gather(
            _soon(self.store.count_spans),
            _soon(self.queue.length) if self.queue else _nothing(),
            _soon(partial(training_metrics, self.store)),
        )
        known = {
            "span_queue_length": (_QUEUE_LENGTH, length if self.queue else 0),
            "agl_store_spans": ("Spans in the store.", spans),
        }
        text = render(Numbers(known, training or []), self.receiver.metrics, self.gateway.metrics)
        return Response(text, media_type=TEXT)


async def _soon(count: Callable[[], Result]) -> Result | None:
    """The result, or None if the store or the queue fails, or has none after _COUNT_S."""
    try:
        async with asyncio.timeout(_COUNT_S):
            return await asyncio.to_thread(count)
    except (AglError, TimeoutError):
        return None


async def _nothing() -> None:
    return None
