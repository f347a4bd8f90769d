"""A test bench for situations: a model server, the recorded spans, and the result of each situation."""

import asyncio
import gc
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

from anyio.from_thread import start_blocking_portal
from opentelemetry import trace

from benchmarks.instrumentations import Switched
from benchmarks.situations.recording import USER, Recording
from tests.vllm_server import FakeVllmServer, running_server

TRACER = trace.get_tracer(USER)
_SETTLE_S = 0.6
_LIMIT_S = 30.0


class WrongError(Exception):
    """A span that is wrong or missing, described for the page."""


def expect(right: bool, wrong: str) -> None:
    if not right:
        raise WrongError(wrong)


@dataclass(frozen=True, slots=True)
class Desk:
    """The test bench. `switched` is the instrumentation; `log` has the messages logged as warnings or errors."""

    switched: Switched
    recording: Recording
    server: FakeVllmServer
    log: list[str] = field(default_factory=list)

    async def settled(self) -> Recording:
        """The recording, once every span has ended or after _SETTLE_S seconds."""
        for _ in range(int(_SETTLE_S / 0.02)):
            if not self.recording.open:
                break
            await asyncio.sleep(0.02)
        return self.recording


Check = Callable[..., Awaitable[None]]
Way = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Situation:
    """One row of the page. `check` raises WrongError; it runs once for each of `ways`, or once if there are none."""

    title: str
    check: Check
    ways: Sequence[Way]

    def verdict(self, desk: Desk) -> str | None:
        """None if nothing is wrong, else the faults with the ways in which they occur."""
        if not self.ways:
            return self._wrong(desk)
        wrongs: dict[str, list[str]] = {}
        for way in self.ways:
            if wrong := self._wrong(desk, way):
                wrongs.setdefault(wrong, []).append(f"`{way.__name__}`")
        if len(wrongs) == 1 and len(self.ways) == len(next(iter(wrongs.values()))):
            return next(iter(wrongs))
        return "; ".join(f"{', '.join(ways)}: {wrong}" for wrong, ways in wrongs.items()) or None

    def _wrong(self, desk: Desk, *way: Way) -> str | None:
        """Run the check with an empty recording, in a context without spans."""
        gc.collect()  # so that finalizers of the previous attempt do not log in this one
        desk.recording.clear()
        desk.log.clear()
        try:
            Context().run(asyncio.run, asyncio.wait_for(self.check(desk, *way), _LIMIT_S))
        except WrongError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 - any failure that an instrumentation causes is a finding
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return None


class Situations(list[Situation]):
    """The rows of one framework, in order."""

    def row(self, title: str, ways: Sequence[Way] = ()) -> Callable[[Check], Check]:
        def add(check: Check) -> Check:
            self.append(Situation(title, check, ways))
            return check

        return add


class _Listener(logging.Handler):
    def __init__(self, log: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith("aiohttp"):  # the server, whose clients may disconnect
            self._log.append(record.getMessage())


@contextmanager
def open_desk(switched: Switched, recording: Recording) -> Iterator[Desk]:
    """A desk whose server runs in a separate thread, because a synchronous agent blocks the event loop."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(running_server()) as server:
        desk = Desk(switched, recording, server)
        listener = _Listener(desk.log)
        logging.getLogger().addHandler(listener)
        yield desk
        logging.getLogger().removeHandler(listener)
