"""Sends a call to an engine: chooses it, waits for a slot, retries on failure, asks a second engine if one is slow."""

import asyncio
import hashlib
import random
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection, Hashable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import aiohttp

from agl.config import GatewayConfig, UpstreamConfig
from agl.gateway.engine import Engine, UpstreamResponse
from agl.gateway.engine_kind import ENGINE_KINDS, EngineKind
from agl.gateway.record import CallRecord
from agl.server.api_error import ApiError

_RETRIED_STATUSES: Final = frozenset({429, 502, 503, 504})
"""The engine may answer later, or a different engine now."""
_RETRIED_FAILURES: Final = frozenset({"engine_unreachable", "engine_error"})
_BUSY_RETRY_AFTER_S: Final = 5
_PAUSED_RETRY_AFTER_S: Final = 1
_LONGEST_BACKOFF_S: Final = 10.0
_ROLLOUTS_PINNED: Final = 65_536


class Routes:
    """The engines, and two tables of names for them: `names` of clients, and the `versions` of roles.

    A client's name is a role, a policy, or a name that the agent's code already had. `names` maps it to a role, a
    policy or a pinned version (`gpt-4o` to `planner`); `versions` maps a role to the version that answers for it
    (`planner` to `planner@12`). All calls of a rollout go to one engine, which has their prefix cached.
    """

    def __init__(self, engines: Sequence[Engine], names: Mapping[str, str]) -> None:
        self.engines = tuple(engines)
        self._changing = threading.Lock()
        self.names = dict(names)
        self.versions: Mapping[str, str] = {}
        self._pinned: OrderedDict[Hashable, Mapping[str, str]] = OrderedDict()

    def add_engine(self, config: UpstreamConfig) -> None:
        with self._changing:
            self.engines = (*self.engines, Engine(config))

    def remove_engine(self, url: str) -> None:
        with self._changing:
            self.engines = tuple(engine for engine in self.engines if engine.url != url)

    def policy(self, model: str) -> str:
        """The role, policy or version that a client's name means; a name is looked up once, not followed further."""
        return self.names.get(model, model)

    def switch(self, versions: Mapping[str, str | None]) -> None:
        """Change `versions` in one step; None removes a role. Pinned rollouts keep those that they began with."""
        self.versions = {role: name for role, name in {**self.versions, **versions}.items() if name is not None}

    def resolve(self, model: str, production: Mapping[str, str], pinned: Hashable | None = None) -> str:
        """The engines' name for what a client calls `model`.

        `pinned` is a rollout whose calls all use the versions of its first call. For others `production` precedes
        `versions`.
        """
        policy, versions = self.policy(model), {**self.versions, **production}
        if pinned is not None:
            versions = self._pinned[pinned] = self._pinned.pop(pinned, self.versions)
            if len(self._pinned) > _ROLLOUTS_PINNED:
                self._pinned.popitem(last=False)
        return versions.get(policy, policy)

    def kind(self, model: str) -> EngineKind:
        """The kind of the engines that serve `model`; the configuration allows only one."""
        return next((engine.kind for engine in self.engines if engine.serves(model)), ENGINE_KINDS["vllm"])

    def choose(self, model: str, rollout: str | None, tried: Collection[Engine] = ()) -> Engine:
        """An engine that serves `model`, preferably one that was not `tried`, then one that is reachable.

        Calls of a `rollout` get the same engine while it is reachable (rendezvous hashing), calls without a rollout
        the least busy one. Raises ApiError if no engine serves the model.
        """
        serving = [engine for engine in self.engines if engine.serves(model)]
        if not serving:
            raise self._no_engine(model)
        best = min((engine in tried, not engine.is_reachable) for engine in serving)
        equal = [engine for engine in serving if (engine in tried, not engine.is_reachable) == best]
        if len(equal) == 1:
            return equal[0]
        if rollout is None:
            return min(equal, key=lambda engine: (engine.queue.in_use + engine.queue.waiting) / engine.queue.limit)
        return max(equal, key=lambda engine: _rendezvous_weight(engine, rollout))

    def _no_engine(self, model: str) -> ApiError:
        if not self.engines:
            message = "the gateway has no engine; start it with --upstream URL or train with it"
            return ApiError(503, "no_engine", message)
        return ApiError(404, "model_not_found", f"no engine of the gateway is configured to serve {model!r}")


class PauseGate:
    """Counts the calls at the engines, and admits none while weights change. For one event loop."""

    def __init__(self) -> None:
        self.is_paused = False
        self.active_calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def check(self) -> None:
        """Raises ApiError with a retry time while paused."""
        if self.is_paused:
            message = "the gateway is paused while weights change; ask again"
            raise ApiError(429, "paused", message, retry_after_s=_PAUSED_RETRY_AFTER_S)

    def enter(self) -> None:
        """Count a call until `leave`. Raises ApiError while paused."""
        self.check()
        self.active_calls += 1
        self._idle.clear()

    def leave(self) -> None:
        self.active_calls -= 1
        if self.active_calls == 0:
            self._idle.set()

    async def pause(self, drain_s: float) -> None:
        """Admit no further call, and wait up to `drain_s` seconds until no call is active."""
        self.is_paused = True
        try:
            async with asyncio.timeout(drain_s):
                await self._idle.wait()
        except TimeoutError:
            pass

    def resume(self) -> None:
        self.is_paused = False


class Dispatch:
    """Sends calls to the engines of `routes` while `gate` admits them. For one event loop."""

    def __init__(self, routes: Routes, gate: PauseGate, config: GatewayConfig) -> None:
        self._routes = routes
        self._gate = gate
        self._config = config

    def choose_engine(self, record: CallRecord, tried: Collection[Engine] = ()) -> Engine:
        """The engine for a call. Raises ApiError if none serves its model, or the gateway is paused."""
        self._gate.check()
        return self._routes.choose(record.engine_model, record.caller.rollout, tried)

    @asynccontextmanager
    async def response(self, session: aiohttp.ClientSession, record: CallRecord) -> AsyncIterator[UpstreamResponse]:
        """Send `record.body`; yields the first engine's response, an error status included, and closes it at the end.

        The first engine is `record.engine` if that is set. An attempt that fails before any part of a response could
        be passed on is followed by another. Raises ApiError when the last attempt fails.
        """
        request = await self._send_with_retries(session, record)
        record.engine = request.engine
        try:
            yield request.response
        finally:
            request.close()

    async def _send_with_retries(self, session: aiohttp.ClientSession, record: CallRecord) -> "_ActiveRequest":
        deadline = asyncio.get_running_loop().time() + self._config.timeouts.total_s
        tried: list[Engine] = []
        for retry in range(self._config.retries + 1):
            last = retry == self._config.retries
            try:
                request = await self._send_hedged(session, record, tried, deadline)
            except ApiError as error:
                if last or error.code not in _RETRIED_FAILURES:
                    raise
                reason, after_s = str(error), 0.0
            else:
                response = request.response
                # An engine that has just restarted lacks the adapters that the others have.
                lacks_model = response.status == HTTPStatus.NOT_FOUND and self._is_untried(record.engine_model, tried)
                if last or not (lacks_model or response.status in _RETRIED_STATUSES):
                    return request
                reason = f"the engine at {response.url} answered {response.status}: {response.error_message()}"
                after_s = _retry_after_s(response)
                request.close()
                if after_s > _LONGEST_BACKOFF_S:
                    return request  # The client gets the body, which is complete, and may wait for longer.
            record.retries.append(reason)
            await asyncio.sleep(max(after_s, self._config.backoff_s * 2**retry * random.uniform(0.5, 1)))
        raise AssertionError("the last attempt returns or raises")

    def _is_untried(self, engine_model: str, tried: Sequence[Engine]) -> bool:
        """Whether an engine that was not tried serves the model."""
        return any(engine.serves(engine_model) for engine in {*self._routes.engines} - {*tried})

    async def _send_hedged(
        self, session: aiohttp.ClientSession, record: CallRecord, tried: list[Engine], deadline: float
    ) -> "_ActiveRequest":
        """One attempt; a second engine joins it when the first has been silent for `hedge_after_s`."""
        first = record.engine if record.engine and not tried else self.choose_engine(record, tried)
        tried.append(first)
        if self._config.hedge_after_s is None or len(self._routes.engines) < 2:
            return await self._send(session, record, first, deadline)
        tasks = {asyncio.create_task(self._send(session, record, first, deadline))}
        try:
            done, _ = await asyncio.wait(tasks, timeout=self._config.hedge_after_s)
            if not done and (second := self.choose_engine(record, tried)) not in tried:
                tried.append(second)
                tasks.add(asyncio.create_task(self._send(session, record, second, deadline)))
            while True:
                done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                good = next((task for task in done if task.exception() is None), None)
                if good is not None or not tasks:
                    tasks |= done - {good}
                    return (good or done.pop()).result()
        finally:
            for task in tasks:
                _abandon(task)

    async def _send(
        self, session: aiohttp.ClientSession, record: CallRecord, engine: Engine, deadline: float
    ) -> "_ActiveRequest":
        """Wait for a slot at `engine` and send the request. The slot is free again when the engine has ended."""
        record.engine = engine
        with ExitStack() as held:
            await self._acquire_slot(engine, record)
            held.callback(engine.queue.release)
            self._gate.enter()
            held.callback(self._gate.leave)
            response = await engine.post(
                session, record.path, record.body, record.headers, self._config.timeouts, deadline
            )
            response.on_end(held.pop_all().close)
            return _ActiveRequest(engine, response)

    async def _acquire_slot(self, engine: Engine, record: CallRecord) -> None:
        before, queue_s = time.perf_counter_ns(), self._config.timeouts.queue_s
        try:
            async with asyncio.timeout(queue_s):
                await engine.queue.acquire(record.caller.rollout or "")
        except TimeoutError as error:
            raise ApiError(
                429,
                "engine_busy",
                f"the engine at {engine.url} had no slot for {queue_s:g} s: {engine.queue.limit} calls are active "
                f"(max_concurrent), {engine.queue.waiting} wait",
                retry_after_s=_BUSY_RETRY_AFTER_S,
            ) from error
        finally:
            record.queue_ns += time.perf_counter_ns() - before


@dataclass(frozen=True, slots=True)
class _ActiveRequest:
    """A request that holds a slot at its engine, which has begun to respond."""

    engine: Engine
    response: UpstreamResponse

    def close(self) -> None:
        """Close the response and release the slot. May be called twice."""
        self.response.close()


def _abandon(task: "asyncio.Task[_ActiveRequest]") -> None:
    """Cancel a request, and close its response if that has already begun."""
    task.cancel()
    task.add_done_callback(lambda done: None if done.cancelled() or done.exception() else done.result().close())


def _rendezvous_weight(engine: Engine, rollout: str) -> bytes:
    return hashlib.blake2b(f"{engine.url}\0{rollout}".encode(), digest_size=8).digest()


def _retry_after_s(response: UpstreamResponse) -> float:
    """The engine's `retry-after`; 0 without one, or for a value that is no number of seconds."""
    try:
        return max(0.0, float(response.headers.get("retry-after", 0)))
    except ValueError:
        return 0.0
