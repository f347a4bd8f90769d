"""Who makes a call: read from the URL, from the W3C headers of the request, and from the store."""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Self

from opentelemetry import trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.requests import Request

from agl import semconv
from agl.context import carried_attributes
from agl.store import Rollout, Store

_TRACE_CONTEXT = TraceContextTextMapPropagator()
_BAGGAGE = W3CBaggagePropagator()
_ROLLOUTS_REMEMBERED: Final = 65_536


@dataclass(frozen=True, slots=True)
class Caller:
    """The rollout that a call belongs to, as far as the request says, and the span that made it."""

    rollout_id: str | None = None
    attempt_id: str | None = None
    group_id: str | None = None
    mode: str | None = None
    role: str | None = None
    trace_id: str | None = None
    """None: the call starts a trace of its own."""
    parent_id: str | None = None

    @classmethod
    def read(cls, headers: Mapping[str, str], url: Mapping[str, str]) -> Self:
        """The caller by `traceparent`, `baggage` and the URL's `rollout_id` and `attempt_id`, which count most."""
        carried = carried_attributes(_BAGGAGE.extract(headers, Context()))
        parent = trace.get_current_span(_TRACE_CONTEXT.extract(headers, Context())).get_span_context()
        return cls(
            rollout_id=url.get("rollout_id") or carried.get(semconv.ROLLOUT_ID),
            attempt_id=url.get("attempt_id") or carried.get(semconv.ATTEMPT_ID),
            group_id=carried.get(semconv.GROUP_ID),
            mode=carried.get(semconv.MODE),
            role=carried.get(semconv.ROLE),
            trace_id=trace.format_trace_id(parent.trace_id) if parent.is_valid else None,
            parent_id=trace.format_span_id(parent.span_id) if parent.is_valid else None,
        )

    def completed_by(self, rollout: Rollout | None) -> Self:
        """With group and mode of the queued `rollout` where the request names none; mode `prod` where nothing does."""
        if rollout is None:
            return replace(self, mode=self.mode or "prod")
        return replace(self, mode=self.mode or rollout.mode, group_id=self.group_id or rollout.group_id)

    @property
    def seed_key(self) -> tuple[str, str] | None:
        """Rollout and attempt of a call that trains."""
        return (self.rollout_id, self.attempt_id or "") if self.mode == "train" and self.rollout_id else None

    def attributes(self) -> dict[str, str]:
        """What every span of the call carries."""
        named = {
            semconv.ROLLOUT_ID: self.rollout_id,
            semconv.ATTEMPT_ID: self.attempt_id,
            semconv.GROUP_ID: self.group_id,
            semconv.MODE: self.mode,
            semconv.ROLE: self.role,
        }
        return {name: value for name, value in named.items() if value}


class Callers:
    """Finds out who calls; what `store` says of a rollout is remembered, since it does not change."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: OrderedDict[str, Rollout] = OrderedDict()

    async def identify(self, request: Request) -> Caller:
        caller = Caller.read(request.headers, request.path_params)
        if caller.rollout_id is None or caller.mode is not None:
            return caller.completed_by(None)
        return caller.completed_by(await self._rollout(caller.rollout_id))

    async def _rollout(self, rollout_id: str) -> Rollout | None:
        if rollout_id in self._known:
            self._known.move_to_end(rollout_id)
            return self._known[rollout_id]
        rollout = await asyncio.to_thread(self._store.get_rollout, rollout_id)
        if rollout is not None:
            self._known[rollout_id] = rollout
            if len(self._known) > _ROLLOUTS_REMEMBERED:
                self._known.popitem(last=False)
        return rollout
