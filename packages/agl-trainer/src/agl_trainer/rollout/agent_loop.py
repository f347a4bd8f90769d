"""The asyncio loop on which async agents run."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from agl.errors import AgentError

_CLOSE_WITHIN_S = 2.0


class AgentLoop:
    """An event loop in a daemon thread of its own.

    All rollouts share one, and it lives as long as its runner: the HTTP clients that an agent keeps (or its framework
    caches) are bound to the loop that first used them. As a daemon it never keeps the process from ending.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(_DaemonThreads())
        self._thread = threading.Thread(target=self._run, name="agl-agents", daemon=True)
        self._thread.start()

    def submit(self, awaitable: Awaitable[Any]) -> Future[Any]:
        """Run `awaitable` here, in a copy of the calling thread's context; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(_guarded(awaitable), self._loop)

    def is_blocked(self, wait_s: float = 1.0) -> bool:
        """Whether the loop does not turn within `wait_s`: something on it blocks without awaiting."""
        try:
            self.submit(asyncio.sleep(0)).result(wait_s)
        except TimeoutError:
            return True
        return False

    def close(self) -> None:
        """Cancel what still runs and end the thread; one that is blocked is left behind."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_WITHIN_S)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop().run_forever()


class _DaemonThreads(ThreadPoolExecutor):
    """Runs `asyncio.to_thread` and its like, a daemon thread for each call.

    A call that hangs would use up a pool for every later rollout, and the pool would keep the process from ending.
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
    except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits for the future
        future.set_exception(error)


async def _guarded(awaitable: Awaitable[Any]) -> Any:
    try:
        return await awaitable
    except (SystemExit, KeyboardInterrupt) as error:  # either would end the loop, and every other rollout with it
        raise AgentError(f"it raised {type(error).__name__} ({error})") from error
