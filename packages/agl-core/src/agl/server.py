"""Serving our ASGI apps from a background thread: gateway and API on one port, the OTLP receiver on another."""

import asyncio
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from agl.collector import Collector
from agl.config import GatewayConfig
from agl.errors import AglError
from agl.gateway import Gateway
from agl.store import Store

_POLL_S = 0.005
_GRACE_S = 3
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

    def add(self, app: ASGIApp, *, host: str = "127.0.0.1", port: int = 0, name: str = "app") -> str:
        """Bind `app` to `port` (0: a free one); returns its base URL, without a slash at the end.

        Raises AglError naming the port when it cannot be had.
        """
        try:
            listener = _listen(host, port)
        except OSError as error:
            raise AglError(
                f"the {name} cannot listen on {host}:{port}: {error.strerror}; choose another host or port"
            ) from error
        config = uvicorn.Config(
            app, log_config=None, log_level="warning", access_log=False, ws="none", timeout_graceful_shutdown=_GRACE_S
        )
        self._servers.append((uvicorn.Server(config), listener))
        return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"

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
            asyncio.run(self._serve())
        except BaseException as error:  # uvicorn leaves by SystemExit when an app's lifespan fails.
            if self._started.done():
                raise
            self._started.set_exception(error)

    async def _serve(self) -> None:
        serving = asyncio.gather(*(server.serve(sockets=[listener]) for server, listener in self._servers))
        while not serving.done() and not all(server.started for server, _ in self._servers):
            await asyncio.sleep(_POLL_S)
        if not serving.done():
            self._started.set_result(None)
        await serving


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; with it each answer waits for a delayed ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


class ServerThread(AppThread):
    """What `agl serve` serves: the gateway with `/api/health` at `base_url`, the OTLP/HTTP receiver at `otlp_url`.

    `upstream` is the engine: its base URL ending in `/v1`, or an ASGI app, which is then served too, on a free port;
    None: calls are refused until there is one. Port 0 takes a free port. Raises AglError naming a port in use.
    """

    def __init__(
        self,
        store: Store,
        *,
        host: str = "127.0.0.1",
        port: int = 8400,
        otlp_http_port: int = 4318,
        upstream: str | ASGIApp | None = None,
        gateway: GatewayConfig | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        try:
            engine = upstream if upstream is None or isinstance(upstream, str) else self._add_engine(upstream)
            proxy = Gateway(store, upstream=engine, config=gateway, overrides=overrides)
            api = proxy.app([_health_route(store, proxy)])
            collector = Starlette(routes=Collector(store).routes())
            self.base_url = self.add(api, host=host, port=port, name="gateway")
            self.otlp_url = self.add(collector, host=host, port=otlp_http_port, name="OTLP/HTTP receiver")
        except AglError:
            self.stop()
            raise

    def _add_engine(self, engine: ASGIApp) -> str:
        # On loopback whatever `host` is: only the gateway talks to it.
        return self.add(engine, name="engine") + "/v1"


def _health_route(store: Store, gateway: Gateway) -> Route:
    async def health(_: Request) -> JSONResponse:
        spans, answers = await asyncio.gather(asyncio.to_thread(store.count_spans), gateway.engine_answers())
        return JSONResponse({"spans": spans, "engine": {"upstream": gateway.upstream, "answers": answers}})

    return Route("/api/health", health)
