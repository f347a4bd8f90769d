"""What every store can do. The verbs are synchronous and thread-safe; async callers use `asyncio.to_thread`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from agl import otlp
from agl.span import Span
from agl.store.rollout import Attempt, Rollout
from agl.store.span_row import SpanRow
from agl.store.states import AttemptState, RolloutState

QUIET_S: Final = 600.0
"""A rollout that was never queued, and so never ends, is taken to be over once no span of it came for so long."""


@dataclass(frozen=True, slots=True)
class Resource:
    """A versioned thing that the loop produces, e.g. the adapter folder of a role. Versions of a name count from 0."""

    name: str
    version: int
    uri: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Collected:
    """What `gc` took away."""

    rollouts: int = 0
    spans: int = 0


class Store(Protocol):
    """Durable home of spans, rollouts, resources and metrics.

    A verb that changes something returns only after the change is committed, and raises StoreError where it is not:
    then the caller may repeat it, unless that is an InputError, an UnknownIdError or a TransitionError. Times are of
    the store's clock; `now_ns` stands in for it where a verb takes it.
    """

    uri: str

    # --- Spans -------------------------------------------------------------------------------------------------------

    def append_spans(self, spans: Sequence[Span]) -> int:
        """`append_rows` of `spans`."""
        return self.append_rows([SpanRow.of(span) for span in spans])

    def query_spans(self, rollout_id: str) -> list[Span]:
        """The spans that `query_rows` finds."""
        return otlp.decode(b"".join(self.query_rows(rollout_id)))

    def append_rows(self, rows: Sequence[SpanRow]) -> int:
        """Keep spans; one already kept (same trace id and span id) is left as it is. Returns how many were new.

        All are kept or none; `CassandraStore` says where it cannot promise that. Each counts as a heartbeat of the
        attempt that it names, if the store knows that one; how a rollout ended does not matter: late spans belong to it
        as well.
        """
        ...

    def query_rows(self, rollout_id: str) -> list[bytes]:
        """Spans of a rollout by start time, then by arrival, as OTLP.

        They are those that name it, and those of its traces that name no rollout. A gateway call without a parent
        stands in a trace of its own: the request came without `traceparent`. Its trace and the first that tells of
        the same answer (`Span.response_id`) count as one.
        """
        ...

    def count_spans(self) -> int: ...

    def last_rollout_id(self) -> str | None:
        """Rollout of the span that arrived last and names a rollout; else of the span that arrived last."""
        ...

    def rollout_ids(self) -> list[str]:
        """Every rollout of which there are spans, by the arrival of the first of them where the store keeps that.

        Those that spans name, and the traces of which no span names one. A gateway call without a parent makes a trace
        of its own, though it belongs to the rollout that `query_rows` finds for both. This reads what all spans are
        found by.
        """
        ...

    # --- Rollouts ----------------------------------------------------------------------------------------------------

    def enqueue_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        """Queue `rollouts`; an id that is already known is left as it is, so a caller may repeat itself."""
        ...

    def lease_rollout(self, worker_id: str, rollout_id: str | None = None) -> tuple[Rollout, Attempt] | None:
        """The rollout queued first, with a new attempt, now running; None when the queue is empty. Never blocks.

        With `rollout_id` that one alone: a runner takes its own and leaves what others queued. One that is tried
        again keeps its place.
        """
        ...

    def heartbeat(self, attempt_ids: Sequence[str]) -> list[str]:
        """Say that these attempts are alive; returns those that are over: their workers have nothing left to do.

        Raises UnknownIdError for an id that is not known.
        """
        ...

    def finish_attempt(self, attempt_id: str, state: AttemptState, error: str | None = None) -> Rollout:
        """End an attempt as one of `states.ENDS`; its rollout succeeds, fails, or is queued again (`rollout.finish`).

        Raises TransitionError for an attempt that is over, UnknownIdError for an id that is not known.
        """
        ...

    def cancel_rollouts(self, rollout_ids: Sequence[str]) -> None:
        """Cancel rollouts with their running attempts; what is over stays as it is.

        Raises UnknownIdError for an id that is not known; then none is cancelled.
        """
        ...

    def end_overdue_attempts(self, now_ns: int | None = None) -> list[Attempt]:
        """The watchdog: end running attempts over the limits of their rollouts (`rollout.expire`); returns these.

        Whoever serves the store, or runs rollouts of it, calls this every few seconds; several may at once.
        """
        ...

    def wait_for_rollouts(self, rollout_ids: Sequence[str], timeout_s: float | None = None) -> list[Rollout]:
        """Block until all these rollouts are over or the time is up; returns them as they then are, in that order.

        Raises UnknownIdError for an id that is not known.
        """
        ...

    def wait_for_group(self, group_id: str, timeout_s: float | None = None) -> list[Rollout]:
        """`wait_for_rollouts` of those of a group that are queued by now."""
        return self.wait_for_rollouts([rollout.rollout_id for rollout in self.query_rollouts(group_id)], timeout_s)

    def get_rollout(self, rollout_id: str) -> Rollout | None: ...

    def query_rollouts(self, group_id: str) -> list[Rollout]:
        """Rollouts of a group in the order in which they were queued."""
        ...

    def query_attempts(self, rollout_id: str) -> list[Attempt]:
        """Attempts of a rollout by number."""
        ...

    def count_rollouts(self) -> dict[RolloutState, int]:
        """How many rollouts are in each state; every state is there."""
        ...

    # --- Resources and metrics ---------------------------------------------------------------------------------------

    def put_resource(self, resource: Resource) -> None:
        """Keep a resource; the same name and version again replaces it (a resumed run repeats its last step)."""
        ...

    def get_resource(self, name: str, version: int | None = None) -> Resource | None:
        """A version of a resource, the newest by default."""
        ...

    def lease_resource(
        self, name: str, holder: str, ttl_s: float, version: int | None = None, *, now_ns: int | None = None
    ) -> Resource | None:
        """`get_resource`, and keep what it finds from being collected for `ttl_s` seconds from now.

        The same holder again moves the end of its lease. A version may have many holders.
        """
        ...

    def release_resource(self, name: str, holder: str, version: int) -> None:
        """End a lease before its time. One that is not there is none to end."""
        ...

    def collect_resources(self, name: str, keep: int = 1, *, now_ns: int | None = None) -> list[Resource]:
        """Forget the versions of a resource that nobody leases, but for the newest `keep`; returns them.

        What they point at is the caller's to delete: nobody can lease them any more.
        """
        ...

    def append_metrics(self, run: str, step: int, metrics: Mapping[str, float]) -> None:
        """Keep metrics of a step; the same run, step and name again replaces the value."""
        ...

    def query_metrics(self, run: str) -> dict[str, list[tuple[int, float]]]:
        """Metric name to its (step, value) pairs by step."""
        ...

    # --- Upkeep ------------------------------------------------------------------------------------------------------

    def gc(
        self, *, older_than_s: float | None = None, max_bytes: int | None = None, now_ns: int | None = None
    ) -> Collected:
        """Delete rollouts with all their attempts and spans: those over for longer than `older_than_s` seconds, and
        then the oldest until what is left takes up `max_bytes` or less, by the store's own measure.

        Only rollouts that are over, and only whole ones: age counts from the end of a rollout and from the arrival of
        its last span, whichever is later, and one that was never queued is over after `QUIET_S`. Spans that name no
        rollout go with the last of the rollouts that they belong to.
        """
        ...

    def close(self) -> None:
        """Let go of the store, once what was begun is committed. May be called twice; other verbs then raise."""
        ...
