"""A call's way to an engine: a place there, another try where one failed, a second engine where the first is slow."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import aiohttp

from agl.config import GatewayConfig
from agl.gateway.engine import Engine
from agl.gateway.gate import Gate
from agl.gateway.routing import Routes
from agl.gateway.upstream_response import Answer
from agl.server.api_error import ApiError

_RETRIED: Final = frozenset({429, 502, 503, 504})
"""Statuses of engines that cannot now, and may later or elsewhere."""
_RETRIED_FAILURES: Final = frozenset({"engine_unreachable", "engine_error"})
_BUSY_RETRY_AFTER_S: Final = 5
_LONGEST_PAUSE_S: Final = 10.0


@dataclass(slots=True)
class Trip:
    """What a call needs on its way, and what happened to it there."""

    model: str
    path: str
    body: bytes
    headers: Mapping[str, str]
    rollout: str | None
    start_ns: int = field(default_factory=time.time_ns)
    engine: Engine | None = None
    """The last that was tried, in the end the one that answers."""
    queue_ns: int = 0
    """Nanoseconds spent waiting for places."""
    retries: list[str] = field(default_factory=list)
    """Why each try but the last came to nothing."""


class Dispatch:
    """Sends calls to the engines of `routes` while `gate` is open. For one event loop."""

    def __init__(self, routes: Routes, gate: Gate, config: GatewayConfig) -> None:
        self._routes = routes
        self._gate = gate
        self._config = config

    def engine_for(self, trip: Trip) -> Engine:
        """An engine like the one that gets `trip`. Raises ApiError where none serves its model, or all are paused."""
        self._gate.check()
        return self._routes.choose(trip.model, trip.rollout)

    @asynccontextmanager
    async def answer(self, session: aiohttp.ClientSession, trip: Trip) -> AsyncIterator[Answer]:
        """The answer to `trip` from the engine that gives one first, whatever it says; closed at the end.

        A try that fails before anything of its answer could be passed on is followed by another. Raises ApiError when
        the last one fails.
        """
        visit = await self._visit_until_answered(session, trip)
        trip.engine = visit.engine
        try:
            yield visit.answer
        finally:
            visit.end()

    async def _visit_until_answered(self, session: aiohttp.ClientSession, trip: Trip) -> "_Visit":
        deadline = asyncio.get_running_loop().time() + self._config.timeouts.total_s
        tried: list[Engine] = []
        for retry in range(self._config.retries + 1):
            last = retry == self._config.retries
            try:
                visit = await self._hedged(session, trip, tried, deadline)
            except ApiError as refusal:
                if last or refusal.code not in _RETRIED_FAILURES:
                    raise
                reason, after_s = str(refusal), 0.0
            else:
                if last or visit.answer.status not in _RETRIED:
                    return visit
                reason, after_s = _say(visit.answer), _asked_pause(visit.answer)
                visit.end()
                if after_s > _LONGEST_PAUSE_S:
                    return visit  # Its body is here, and the client may have more patience.
            trip.retries.append(reason)
            await asyncio.sleep(max(after_s, self._config.backoff_s * 2**retry * random.uniform(0.5, 1)))
        raise AssertionError("the last try returns or raises")

    async def _hedged(
        self, session: aiohttp.ClientSession, trip: Trip, tried: list[Engine], deadline: float
    ) -> "_Visit":
        """One try, or two at once where the first engine is silent for `hedge_after_s` and there is another."""
        first = asyncio.create_task(self._visit(session, trip, tried, deadline)) if self._may_hedge else None
        if first is None:
            return await self._visit(session, trip, tried, deadline)
        tasks = {first}
        try:
            await asyncio.wait(tasks, timeout=self._config.hedge_after_s)
            if not first.done() and self._routes.choose(trip.model, trip.rollout, tried) not in tried:
                tasks.add(asyncio.create_task(self._visit(session, trip, tried, deadline)))
            while tasks:
                done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                good = next((task for task in done if task.exception() is None), None)
                if good is not None or not tasks:
                    tasks |= done - {good}
                    return (good or done.pop()).result()
            raise AssertionError("one of the visits ends last")
        finally:
            for task in tasks:
                _abandon(task)

    @property
    def _may_hedge(self) -> bool:
        return self._config.hedge_after_s is not None and len(self._routes.engines) > 1

    async def _visit(
        self, session: aiohttp.ClientSession, trip: Trip, tried: list[Engine], deadline: float
    ) -> "_Visit":
        """Wait for a place at an engine and ask it."""
        self._gate.check()
        engine = self._routes.choose(trip.model, trip.rollout, tried)
        tried.append(engine)
        trip.engine = engine
        await self._take_place(engine, trip)
        try:
            self._gate.enter()
        except BaseException:
            engine.slots.give_back()
            raise
        try:
            headers = engine.headers(trip.headers)
            answer = await Answer.open(
                session, engine.url, trip.path, trip.body, headers, self._config.timeouts, deadline
            )
        except BaseException as error:
            if isinstance(error, ApiError) and error.code == "engine_unreachable":
                engine.answers = False
            self._gate.leave()
            engine.slots.give_back()
            raise
        engine.answers = True
        return _Visit(engine, answer, self._gate)

    async def _take_place(self, engine: Engine, trip: Trip) -> None:
        before, queue_s = time.perf_counter_ns(), self._config.timeouts.queue_s
        try:
            async with asyncio.timeout(queue_s):
                await engine.slots.take(trip.rollout or "")
        except TimeoutError as error:
            raise ApiError(
                429,
                "engine_busy",
                f"the engine at {engine.url} had no place for {queue_s:g} s: {engine.slots.limit} calls are there "
                f"(max_concurrent), {engine.slots.waiting} wait",
                retry_after_s=_BUSY_RETRY_AFTER_S,
            ) from error
        finally:
            trip.queue_ns += time.perf_counter_ns() - before


@dataclass(slots=True, eq=False)
class _Visit:
    """A place at an engine that has begun to answer."""

    engine: Engine
    answer: Answer
    gate: Gate
    over: bool = False

    def end(self) -> None:
        if not self.over:
            self.over = True
            self.answer.close()
            self.gate.leave()
            self.engine.slots.give_back()


def _abandon(task: "asyncio.Task[_Visit]") -> None:
    """Let go of a visit whose answer nobody reads, even where it has just begun."""
    task.cancel()
    task.add_done_callback(lambda done: None if done.cancelled() or done.exception() else done.result().end())


def _say(answer: Answer) -> str:
    return f"the engine at {answer.url} answered {answer.status}: {answer.error_message()}"


def _asked_pause(answer: Answer) -> float:
    """Seconds that the engine asks for; 0 where it says nothing that can be read."""
    try:
        return max(0.0, float(answer.headers.get("retry-after", 0)))
    except ValueError:
        return 0.0
