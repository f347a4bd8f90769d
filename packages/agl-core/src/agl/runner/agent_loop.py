"""The asyncio event loop of async agents."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from agl.errors import AgentError

_CLOSE_WITHIN_S = 2.0


class AgentLoop:
    """An event loop in its own daemon thread, shared by all rollouts and kept as long as the runner.

    One loop for all: an HTTP client that an agent keeps, or its framework caches, is bound to the loop that first used
    it. A daemon thread does not keep the process alive.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(_DaemonExecutor())
        self._thread = threading.Thread(target=self._run, name="agl-agents", daemon=True)
        self._thread.start()

    def submit(self, awaitable: Awaitable[Any]) -> Future[Any]:
        """Run `awaitable` in a copy of the calling thread's context; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(_guarded(awaitable), self._loop)

    def is_blocked(self, wait_s: float = 1.0) -> bool:
        """Whether the loop runs no callback within `wait_s`, because a coroutine blocks without awaiting."""
        try:
            self.submit(asyncio.sleep(0)).result(wait_s)
        except TimeoutError:
            return True
        return False

    def close(self) -> None:
        """Cancel running coroutines and end the thread; a blocked thread is abandoned."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_WITHIN_S)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop().run_forever()


class _DaemonExecutor(ThreadPoolExecutor):
    """Runs each `asyncio.to_thread` or `run_in_executor` call in its own daemon thread.

    Calls that hang would exhaust a thread pool for all later rollouts, and a pool would keep the process alive.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        threading.Thread(target=_fulfil, args=(future, fn, args, kwargs), name="agl-agents", daemon=True).start()
        return future


def _fulfil(future: Future[Any], fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(fn(*args, **kwargs))
    except BaseException as error:  # noqa: BLE001 - the future raises it where it is awaited
        future.set_exception(error)


async def _guarded(awaitable: Awaitable[Any]) -> Any:
    try:
        return await awaitable
    except (SystemExit, KeyboardInterrupt) as error:  # either would stop the loop and all rollouts on it
        raise AgentError(f"it raised {type(error).__name__} ({error})") from error
