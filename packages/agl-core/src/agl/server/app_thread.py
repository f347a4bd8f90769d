"""Runs ASGI apps in a background thread."""

import asyncio
import logging
import socket
import threading
from concurrent.futures import Future
from typing import Self

import uvicorn
import uvloop
from starlette.types import ASGIApp

from agl.config.tls import TlsConfig
from agl.errors import AglError
from agl.server.auth import AllowedHosts, HostsMiddleware
from agl.server.protocol import SEND_S, Connections, HttpProtocol, max_connections
from agl.server.tls import TlsProtocol, server_context

GRACE_S = 3
"""Time that requests in progress have to finish when a server stops."""
_POLL_S = 0.005
_KEEPALIVE_S = 75
"""Longer than the pause of exporters between two batches (5 s), so that none sends on a connection being closed."""
_BACKLOG = 2048


def _is_news(record: logging.LogRecord) -> bool:
    """False for what uvicorn logs of a request that a stop cancels: a line, and a traceback for each request."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, asyncio.CancelledError) and not str(record.msg).startswith("Cancel %s running task")


logging.getLogger("uvicorn.error").addFilter(_is_news)


class AppThread:
    """ASGI apps, each on its own port, on one event loop in a background thread.

    Call `add` for each app, then `start` or use `with`. `stop` cancels requests that are not finished after GRACE_S.
    """

    def __init__(self) -> None:
        self._connections = Connections(max_connections())
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
        send_s: float = SEND_S,
        hosts: AllowedHosts | None = None,
    ) -> str:
        """Bind `app` to `port` (0: any free port) and return its base URL, without a trailing slash.

        Requests may be for `hosts`; by default for loopback and `host`.
        The connection of a client that reads a long response too slowly, over `send_s` seconds, is closed. Raises
        AglError naming the port if it is in use or not permitted.
        """
        http = type("_HttpProtocol", (HttpProtocol,), {"send_s": send_s, "peers": self._connections})
        config = uvicorn.Config(
            HostsMiddleware(app, hosts or AllowedHosts(host)),
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            http=type("_TlsProtocol", (TlsProtocol,), {"context": server_context(tls), "http": http}) if tls else http,
            ws="none",
            timeout_keep_alive=_KEEPALIVE_S,
            timeout_graceful_shutdown=GRACE_S,
        )
        listener = listen(host, port, name)
        self._servers.append((uvicorn.Server(config), listener))
        return base_url(host, listener.getsockname()[1], tls)

    def start(self) -> None:
        """Serve; returns when every app accepts requests. Raises AglError if one of them fails to start."""
        self._thread.start()
        try:
            self._started.result()
        except BaseException as error:
            self.stop()
            raise AglError(f"the server did not start: {error}") from error

    def stop(self) -> None:
        """Stop serving and release the ports. May be called twice."""
        for server, _ in self._servers:
            server.should_exit = True
        if self._thread.is_alive():
            self._thread.join()
        for _, listener in self._servers:
            listener.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve())
        except BaseException as error:  # uvicorn raises SystemExit when an app's lifespan fails.
            if self._started.done():
                raise
            self._started.set_exception(error)

    async def _serve(self) -> None:
        serving = asyncio.gather(*(server.serve(sockets=[listener]) for server, listener in self._servers))
        # uvicorn's SystemExit ends the loop before the result is awaited below: retrieve it, so that none is reported.
        serving.add_done_callback(lambda done: done.cancelled() or done.exception())
        while not serving.done() and not all(server.started for server, _ in self._servers):
            await asyncio.sleep(_POLL_S)
        if not serving.done():
            self._started.set_result(None)
        await serving


def listen(host: str, port: int, name: str) -> socket.socket:
    """A listening socket for the server called `name`. Raises AglError naming the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio disables Nagle's algorithm only if the protocol is explicit; with Nagle responses wait for delayed ACKs.
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


def base_url(host: str, port: int, tls: TlsConfig | None) -> str:
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
