"""The verbs of every store. They are synchronous and thread-safe; async callers use `asyncio.to_thread`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from agl import otlp
from agl.span import Span
from agl.store.rollout import Attempt, Rollout
from agl.store.span_row import SpanRow, rows_of
from agl.store.states import AttemptState, RolloutState

MAX_PART_BYTES: Final = 2**20
"""Longest part of a file of a resource. Cassandra is slow with longer values."""

ROLLOUTS_PER_READ: Final = 100
"""Rollouts whose spans are in memory at once, where all of a store are read."""


@dataclass(frozen=True, slots=True)
class Resource:
    """A versioned product of training, e.g. the adapter folder of a role. The versions of a name count from 0."""

    name: str
    version: int
    uri: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Collected:
    """How much a `gc` deleted."""

    rollouts: int = 0
    spans: int = 0


@dataclass(frozen=True, slots=True)
class RolloutPage:
    """Ids of rollouts, newest first, and the cursor of the next page; None if there is none."""

    rollout_ids: list[str]
    cursor: str | None


class Store(Protocol):
    """Durable storage of spans, rollouts, resources and metrics.

    A verb that changes something returns after the commit, and raises StoreError if the change is not committed. The
    caller may repeat it, except after an InputError, an UnknownIdError or a TransitionError. Times are by the clock of
    the store; the argument `now_ns` overrides it.
    """

    uri: str

    # --- Spans -------------------------------------------------------------------------------------------------------

    def append_spans(self, spans: Sequence[Span]) -> int:
        """`append_rows` of `spans` and their media."""
        return self.append_rows([row for span in spans for row in rows_of(span)])

    def query_spans(self, rollout_id: str) -> list[Span]:
        """`query_rows` as spans."""
        return otlp.decode(b"".join(self.query_rows(rollout_id)))

    def query_spans_by_rollout(self, rollout_ids: Sequence[str]) -> dict[str, list[Span]]:
        """`query_rows_by_rollout` as spans."""
        found = self.query_rows_by_rollout(rollout_ids)
        return {rollout_id: otlp.decode(b"".join(rows)) for rollout_id, rows in found.items()}

    def read_spans(self, rollout_ids: Sequence[str]) -> Iterator[tuple[str, list[Span]]]:
        """Each of these rollouts with its spans, so many at a time that memory is bounded."""
        for first in range(0, len(rollout_ids), ROLLOUTS_PER_READ):
            yield from self.query_spans_by_rollout(rollout_ids[first : first + ROLLOUTS_PER_READ]).items()

    def append_rows(self, rows: Sequence[SpanRow]) -> int:
        """Store spans; returns how many were new. A span that is stored already (same trace id and span id) stays.

        Stores all or none (`CassandraStore` documents its exception). Each span counts as a heartbeat of the attempt
        that it names, if the store knows the attempt. Spans that arrive after the end of their rollout are stored too.
        """
        ...

    def query_rows(self, rollout_id: str) -> list[bytes]:
        """OTLP requests of the spans of a rollout, one for each span, by start time and then by arrival.

        These are the spans that name the rollout, and the spans of its traces that name no rollout. A gateway call
        without a parent is in a trace of its own, because its request had no `traceparent`: that trace and the trace
        of the first span to arrive with the same `Span.response_id` count as one. `agl.store.membership` has the rule.
        """
        return self.query_rows_by_rollout([rollout_id])[rollout_id]

    def query_rows_by_rollout(self, rollout_ids: Sequence[str]) -> dict[str, list[bytes]]:
        """`query_rows` of each of these rollouts, in their order; for many of them much faster than one by one."""
        ...

    def count_spans(self) -> int: ...

    def last_rollout_id(self) -> str | None:
        """Rollout of the last span to arrive: the one that it names, else one that its trace or its model response
        belongs to, else its trace id.
        """
        ...

    def rollout_ids(self) -> list[str]:
        """All rollouts that have spans, by the arrival of their first span if the store records it.

        Rollouts that spans name, and traces in which no span names one. The trace of a gateway call without a parent is
        listed, although `query_rows` finds its span for another rollout. Scans the whole span index.
        """
        ...

    def list_rollouts(self, limit: int = 50, cursor: str | None = None) -> RolloutPage:
        """Up to `limit` rollouts that have spans, by the arrival of their first span, the newest first.

        `cursor` is that of the page before; rollouts that begin in the meantime do not move later pages. A trace is
        listed only if its spans belong to no other rollout. Raises InputError for a cursor that is none. SQLite and
        PostgreSQL read as many spans as the page has, Cassandra scans the whole span index.
        """
        ...

    # --- Rollouts ----------------------------------------------------------------------------------------------------

    def enqueue_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        """Queue `rollouts`. An id that the store knows already stays as it is, so a caller may repeat the call."""
        ...

    def lease_rollout(
        self, worker_id: str, rollout_id: str | None = None, run: str | None = None
    ) -> tuple[Rollout, Attempt] | None:
        """The rollout queued first, with a new attempt, which now runs; None if the queue is empty. Never blocks.

        With `rollout_id` only that rollout, and with `run` only those whose metadata name that `run`, so that a runner
        can leave the rollouts of others in the queue. A rollout that is queued for another attempt keeps its position.
        """
        ...

    def heartbeat(self, attempt_ids: Sequence[str]) -> list[str]:
        """Report that these attempts are alive; returns those that are over, whose workers should stop.

        Raises UnknownIdError for an id that the store does not know.
        """
        ...

    def finish_attempt(self, attempt_id: str, state: AttemptState, error: str | None = None) -> Rollout:
        """End an attempt as one of `states.ENDS`; its rollout succeeds, fails or is queued again (`lifecycle.finish`).

        Raises TransitionError for an attempt that is over, UnknownIdError for an id that the store does not know.
        """
        ...

    def cancel_rollouts(self, rollout_ids: Sequence[str]) -> None:
        """Cancel rollouts and their running attempts; rollouts that are over stay as they are.

        Raises UnknownIdError for an id that the store does not know, and then cancels none.
        """
        ...

    def end_overdue_attempts(self, now_ns: int | None = None) -> list[Attempt]:
        """End the running attempts that are over the limits of their rollouts (`lifecycle.expire`); returns them.

        Every process that serves the store, or runs rollouts of it, calls this every few seconds.
        """
        ...

    def wait_for_rollouts(self, rollout_ids: Sequence[str], timeout_s: float | None = None) -> list[Rollout]:
        """Block until all these rollouts are over or the time is up; returns them in the given order.

        Raises UnknownIdError for an id that the store does not know.
        """
        ...

    def wait_for_group(self, group_id: str, timeout_s: float | None = None) -> list[Rollout]:
        """`wait_for_rollouts` of the rollouts of a group that are known at the time of the call."""
        return self.wait_for_rollouts([rollout.rollout_id for rollout in self.query_rollouts(group_id)], timeout_s)

    def get_rollout(self, rollout_id: str) -> Rollout | None:
        return self.get_rollouts([rollout_id]).get(rollout_id)

    def get_rollouts(self, rollout_ids: Sequence[str]) -> dict[str, Rollout]:
        """Those of these rollouts that were queued, by id."""
        ...

    def query_rollouts(self, group_id: str) -> list[Rollout]:
        """Rollouts of a group in the order in which they were queued."""
        ...

    def query_attempts(self, rollout_id: str) -> list[Attempt]:
        """Attempts of a rollout by number."""
        ...

    def count_rollouts(self) -> dict[RolloutState, int]:
        """Number of rollouts in each state; has every state as a key."""
        ...

    # --- Resources and metrics ---------------------------------------------------------------------------------------

    def put_resource(self, resource: Resource) -> None:
        """Store a resource. The same name and version replaces it: a resumed run repeats its last step."""
        ...

    def add_resource(self, resource: Resource) -> Resource:
        """Store a resource unless its name and version exist; returns the one that is stored.

        Of several callers that add the same version one succeeds, and all learn which.
        """
        ...

    def get_resource(self, name: str, version: int | None = None) -> Resource | None:
        """A version of a resource, the newest by default."""
        ...

    def query_resources(self, prefix: str = "") -> list[Resource]:
        """All versions of the resources whose names begin with `prefix`, by name and version."""
        ...

    def lease_resource(
        self, name: str, holder: str, ttl_s: float, version: int | None = None, *, now_ns: int | None = None
    ) -> Resource | None:
        """`get_resource`, and protect the result from `collect_resources` for `ttl_s` seconds.

        The same holder renews its lease by another call. A version may have many holders.
        """
        ...

    def release_resource(self, name: str, holder: str, version: int) -> None:
        """End a lease before it expires. Does nothing if there is no such lease."""
        ...

    def collect_resources(self, name: str, keep: int = 1, *, now_ns: int | None = None) -> list[Resource]:
        """Delete the versions of a resource that have no lease, except the newest `keep`; returns them.

        The caller should delete what their URIs refer to: nobody can lease them any more.
        """
        ...

    def put_resource_part(self, name: str, version: int, digest: str, data: bytes) -> None:
        """Store a part of the files of a version, of up to `MAX_PART_BYTES`; `collect_resources` deletes it with that.

        `digest` is the SHA-256 of `data` in hex; the same digest is stored once. Raises InputError if it is of other
        data or these are longer, UnknownIdError if there is no such version. `agl.store.files` stores whole folders.
        """
        ...

    def get_resource_part(self, name: str, version: int, digest: str) -> bytes | None:
        """The part with this digest, as it is stored: the caller compares the two."""
        ...

    def append_metrics(self, run: str, step: int, metrics: Mapping[str, float]) -> None:
        """Store the metrics of a step. The same run, step and name replaces the value."""
        ...

    def query_metrics(self, run: str) -> dict[str, list[tuple[int, float]]]:
        """Metric name to its (step, value) pairs by step."""
        ...

    # --- Maintenance -------------------------------------------------------------------------------------------------

    def damaged_rows(self) -> list[str]:
        """Reads all rollouts, attempts, resources and parts; a line for each that is not what was stored. For spans,
        see `query_rows`.
        """
        ...

    def gc(
        self, *, older_than_s: float | None = None, max_bytes: int | None = None, now_ns: int | None = None
    ) -> Collected:
        """Delete rollouts with all their attempts and spans: those over for longer than `older_than_s` seconds, then
        the oldest until the store takes up at most `max_bytes` by its own measure.

        Deletes only rollouts that are over, and only whole ones. Age counts from the end of a rollout or the arrival
        of its last span, whichever is later; a rollout that was never queued is over `retention.IDLE_S` after that
        arrival. Spans that name no rollout are deleted with the last of the rollouts to which they belong.
        """
        ...

    def close(self) -> None:
        """Commit the pending changes and close the store. May be called twice; other verbs then raise StoreError."""
        ...
