"""Serving our ASGI apps from a background thread."""

import asyncio
import socket
import threading
from concurrent.futures import Future
from types import TracebackType
from typing import Self

import uvicorn
from starlette.types import ASGIApp

from agl.errors import AglError

_POLL_S = 0.005
_GRACE_S = 3


class AppThread:
    """ASGI apps, each on a port of its own, on one event loop in a background thread.

    Add the apps, then `start()` (or enter it as a context manager); `stop()` lets running requests finish for a few
    seconds, then cancels them.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host = host
        self._servers: list[tuple[uvicorn.Server, socket.socket]] = []
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="agl-server", daemon=True)

    def add(self, app: ASGIApp, port: int = 0, *, name: str = "app") -> str:
        """Bind `app` to `port` (0: a free one); returns its base URL, without a slash at the end.

        Raises AglError naming the port when it cannot be had.
        """
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            listener = socket.create_server((self._host, port), family=family, backlog=2048)
        except OSError as error:
            raise AglError(
                f"the {name} cannot listen on {self._host}:{port}: {error.strerror}; choose another port or host"
            ) from error
        config = uvicorn.Config(
            app, log_config=None, log_level="warning", access_log=False, ws="none", timeout_graceful_shutdown=_GRACE_S
        )
        self._servers.append((uvicorn.Server(config), listener))
        host = f"[{self._host}]" if family is socket.AF_INET6 else self._host
        return f"http://{host}:{listener.getsockname()[1]}"

    def start(self) -> None:
        """Serve; returns when every app answers. Raises AglError when one does not start."""
        self._thread.start()
        try:
            self._started.result()
        except BaseException as error:
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
