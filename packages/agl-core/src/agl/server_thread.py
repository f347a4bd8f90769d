"""Serving from background threads: gateway and API on one port, the OTLP receivers on others."""

import asyncio
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import uvicorn
import uvloop
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from agl.collector import GrpcReceiver, HttpReceiver, Receiver
from agl.config import CollectorConfig, GatewayConfig, TlsConfig, UpstreamConfig
from agl.errors import AglError, ConfigError, QueueError
from agl.gateway import Gateway
from agl.server.auth import HEALTH, Guard
from agl.server.bearer import BearerTokens, is_loopback
from agl.server.head_limit import HttpProtocol
from agl.server.tls import uvicorn_options
from agl.store import Store
from agl.store.http.routes import Api

if TYPE_CHECKING:
    from agl.queue import SpanQueue

_METRICS = """\
# HELP span_queue_length Spans that are acknowledged and wait in the queue for the store.
# TYPE span_queue_length gauge
span_queue_length {length}
"""
_POLL_S = 0.005
_GRACE_S = 3
_KEEPALIVE_S = 75
"""Longer than exporters are silent between two batches (5 s), so that none meets a connection being closed."""
_BACKLOG = 2048


class AppThread:
    """ASGI apps, each on a port of its own, on one event loop in a background thread.

    Add the apps, then `start()` (or enter it as a context manager); `stop()` lets running requests finish for a few
    seconds, then cancels them.
    """

    def __init__(self) -> None:
        self._servers: list[tuple[uvicorn.Server, socket.socket]] = []
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="agl-server", daemon=True)

    def add(
        self,
        app: ASGIApp,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        name: str = "app",
        tls: TlsConfig | None = None,
    ) -> str:
        """Bind `app` to `port` (0: a free one); returns its base URL, without a slash at the end.

        Raises AglError naming the port when it cannot be had.
        """
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            http=HttpProtocol,
            ws="none",
            timeout_keep_alive=_KEEPALIVE_S,
            timeout_graceful_shutdown=_GRACE_S,
            **(uvicorn_options(tls) if tls else {}),
        )
        listener = _listen(host, port, name)
        self._servers.append((uvicorn.Server(config), listener))
        return _url(host, listener.getsockname()[1], tls)

    def start(self) -> None:
        """Serve; returns when every app answers. Raises AglError when one does not start."""
        self._thread.start()
        try:
            self._started.result()
        except BaseException as error:
            self.stop()
            raise AglError(f"the server did not start: {error}") from error

    def stop(self) -> None:
        """Stop serving and give the ports back. May be called twice."""
        for server, _ in self._servers:
            server.should_exit = True
        if self._thread.is_alive():
            self._thread.join()
        for _, listener in self._servers:
            listener.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve())
        except BaseException as error:  # uvicorn leaves by SystemExit when an app's lifespan fails.
            if self._started.done():
                raise
            self._started.set_exception(error)

    async def _serve(self) -> None:
        serving = asyncio.gather(*(server.serve(sockets=[listener]) for server, listener in self._servers))
        # uvicorn leaves by SystemExit, which ends the loop before anyone has asked for it here.
        serving.add_done_callback(lambda done: done.cancelled() or done.exception())
        while not serving.done() and not all(server.started for server, _ in self._servers):
            await asyncio.sleep(_POLL_S)
        if not serving.done():
            self._started.set_result(None)
        await serving


def _listen(host: str, port: int, name: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; with it each answer waits for a delayed ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise AglError(
            f"the {name} cannot listen on {host}:{port}: {error.strerror}; choose another host or port"
        ) from error
    return listener


def _url(host: str, port: int, tls: TlsConfig | None) -> str:
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


class ServerThread(AppThread):
    """What `agl serve` serves: gateway and API at `base_url`, receivers at `otlp_url` and `otlp_grpc_url`.

    `upstream` is the engine: its base URL ending in `/v1`, or an ASGI app, which is then served too, on a free port;
    None: the engines that `gateway` lists, and with none calls are refused. Port 0 takes a free port; without
    `otlp_grpc_port` there is no gRPC.
    With a `queue` the receivers put spans there, for its writers to move into `store`, and `/metrics` tells its length.
    With `tokens` every request but `/api/health` needs one that allows it. Raises AglError naming a port in use,
    ConfigError where others can reach `host` and there is no token, or engines are named twice.
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
        upstream: str | ASGIApp | None = None,
        collector: CollectorConfig | None = None,
        queue: "SpanQueue | None" = None,
        gateway: GatewayConfig | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        if not tokens and not is_loopback(host):
            raise ConfigError(f"others can reach {host}: pass --token, or listen on 127.0.0.1")
        receiver = Receiver(queue or store, collector, tokens)
        self._http = HttpReceiver(receiver)
        self._api = Api(store, receiver.config)
        self._grpc = GrpcReceiver(receiver) if otlp_grpc_port is not None else None
        try:
            settings = self._with_engine(gateway or GatewayConfig(), upstream)
            self.gateway = Gateway(store, settings, overrides=overrides)
            routes = [*self._api.routes(), _health_route(store, self.gateway, queue), _metrics_route(queue)]
            api = Guard(self.gateway.app(routes), tokens or BearerTokens())
            self.base_url = self.add(api, host=host, port=port, name="gateway", tls=settings.tls)
            tls = receiver.config.tls
            self.otlp_url = self.add(self._http, host=host, port=otlp_http_port, name="OTLP/HTTP receiver", tls=tls)
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
            self._grpc.stop(_GRACE_S)
        super().stop()
        self._http.close()
        self._api.close()

    def _with_engine(self, config: GatewayConfig, upstream: str | ASGIApp | None) -> GatewayConfig:
        """`config` with `upstream`, if there is one, as its engine."""
        if upstream is None:
            return config
        if config.engines:
            raise ConfigError("gateway.engines lists engines, and this command brings another: take the list out")
        # On loopback whatever `host` is: only the gateway talks to it.
        url = upstream if isinstance(upstream, str) else self.add(upstream, name="engine") + "/v1"
        return config.model_copy(update={"engines": [UpstreamConfig(url=url)]})


def _bind(receiver: GrpcReceiver, host: str, port: int, tls: TlsConfig | None) -> str:
    _listen(host, port, "OTLP/gRPC receiver").close()  # gRPC would not say why it cannot.
    return _url(host, receiver.bind(host, port), tls)


def _health_route(store: Store, gateway: Gateway, queue: "SpanQueue | None") -> Route:
    async def health(_: Request) -> JSONResponse:
        spans, engines = await asyncio.gather(asyncio.to_thread(store.count_spans), gateway.engine_states())
        queued = {"span_queue_length": await asyncio.to_thread(_length, queue)} if queue else {}
        return JSONResponse({"spans": spans, "engines": engines} | queued)

    return Route(HEALTH, health)


def _metrics_route(queue: "SpanQueue | None") -> Route:
    async def metrics(_: Request) -> PlainTextResponse:
        length = await asyncio.to_thread(_length, queue) if queue else 0
        text = _METRICS.format(length="NaN" if length is None else length)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    return Route("/metrics", metrics)


def _length(queue: "SpanQueue") -> int | None:
    try:
        return queue.length()
    except QueueError:
        return None
