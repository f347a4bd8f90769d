"""`gc` in Cassandra: scans all spans once, and then visits the partition keys by the arrival of their last span.

A partition is deleted as of the time when the scan read it: spans that arrive later stay.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from agl.store.cassandra import membership, partition
from agl.store.cassandra.keyspace import Keyspace, Statement
from agl.store.cassandra.membership import RolloutSpans
from agl.store.cassandra.partition import StoredRollout
from agl.store.cassandra.span_partition import IndexedSpan
from agl.store.cassandra.traffic import delete_decisions
from agl.store.protocol import Collected
from agl.store.retention import SPAN_OVERHEAD_BYTES, Limits
from agl.store.states import RolloutState

_CONCURRENT: Final = 32
"""Rollouts that are examined, and deleted, at the same time: each takes several consecutive requests."""

_ALL = "SELECT home, span, arrived_ns, size, writetime(start_ns) FROM spans"
_ROLLOUTS = "SELECT DISTINCT rollout_id, state, ended_ns FROM rollouts"
_DELETE_SPAN = (
    "DELETE FROM spans USING TIMESTAMP ? WHERE home = ? AND bucket = ? AND span = ?",
    "DELETE FROM span_bodies USING TIMESTAMP ? WHERE home = ? AND bucket = ? AND span = ?",
)
_DELETE_PARTITION = (
    "DELETE FROM spans USING TIMESTAMP ? WHERE home = ? AND bucket = ?",
    "DELETE FROM span_bodies USING TIMESTAMP ? WHERE home = ? AND bucket = ?",
)
_DELETE_RESPONSE = "DELETE FROM responses WHERE response_id = ? AND is_answer = ? AND start_ns = ? AND span = ?"
_DELETE_TRACE = "DELETE FROM traces WHERE trace_id = ? AND home = ?"
_DELETE_FROM_GROUP = "DELETE FROM rollout_groups WHERE group_id = ? AND place = ? AND rollout_id = ?"


@dataclass(slots=True)
class _Home:
    """Summary of the spans with one partition key `home`, by the scan."""

    is_named: bool = False
    is_mixed: bool = False
    """Whether it has both spans of a trace and spans of a rollout whose id is that trace id."""
    last_ns: int = 0
    written_us: int = 0

    def add(self, is_named: bool, arrived_ns: int, written_us: int) -> None:
        self.is_mixed |= self.last_ns > 0 and is_named != self.is_named
        self.is_named |= is_named
        self.last_ns, self.written_us = max(self.last_ns, arrived_ns), max(self.written_us, written_us)


@dataclass(frozen=True, slots=True)
class _RolloutToDelete:
    """A rollout, or a trace that names none, with what decides whether it is deleted."""

    spans: RolloutSpans
    owners: dict[str, set[str]]
    stored: StoredRollout | None

    def shared_traces(self, name: str) -> set[str]:
        """Its traces that other rollouts may own too."""
        return {trace for trace in self.spans.traces if self.owners[trace] - {name}}


class CassandraRetention:
    """One run of `gc`."""

    def __init__(self, db: Keyspace, limits: Limits) -> None:
        self._db = db
        self._limits = limits
        self._homes: dict[str, _Home] = defaultdict(_Home)
        self._excess_bytes = 0
        self._rollouts = 0
        self._spans = 0
        self._gone: set[str] = set()
        """Partition keys without spans after the pending deletions."""
        self._recent: set[str] = set()
        """Rollouts marked for deletion since the current candidates were read."""
        self._marked: dict[str, list[IndexedSpan]] = {}
        """Rollouts marked for deletion, with the spans to delete."""
        self._marked_stored: list[str] = []
        """Those of them that have a row in `rollouts`."""

    def collect(self) -> Collected:
        self._scan()
        names = sorted(self._homes, key=lambda home: self._homes[home].last_ns)
        with ThreadPoolExecutor(_CONCURRENT) as pool:
            for first in range(0, len(names), _CONCURRENT):
                some = [name for name in names[first : first + _CONCURRENT] if self._may_go(name)]
                if some:
                    self._recent.clear()
                    for name, candidate in zip(some, pool.map(self._read, some), strict=True):
                        self._decide(name, candidate)
                    self._delete_marked()
        return Collected(self._rollouts + self._delete_without_spans(), self._spans)

    def _scan(self) -> None:
        used = 0
        for home, span, arrived_ns, size, written_us in self._db.scan(_ALL):
            if span is not None and arrived_ns is not None:
                self._homes[home].add(home != span[:16].hex(), arrived_ns, written_us)
                used += size + SPAN_OVERHEAD_BYTES
        self._excess_bytes = 0 if self._limits.max_bytes is None else used - self._limits.max_bytes

    def _may_go(self, name: str) -> bool:
        return name not in self._gone and self._must_go(self._homes[name].last_ns)

    def _must_go(self, last_ns: int) -> bool:
        return last_ns < self._limits.before_ns or self._excess_bytes > 0

    def _read(self, name: str) -> _RolloutToDelete:
        spans = membership.find_spans(self._db, [name])[name]
        (stored,) = partition.read(self._db, [name])
        return _RolloutToDelete(spans, membership.find_owners(self._db, spans), stored)

    def _decide(self, name: str, candidate: _RolloutToDelete) -> None:
        """Mark a rollout for deletion if the rule allows it."""
        if not self._may_go(name):
            return
        if any(owners & self._recent for owners in candidate.owners.values()):
            self._delete_marked()  # Else a trace that both share would keep an owner that is gone.
            candidate = self._read(name)
        shared = candidate.shared_traces(name)
        if shared and not self._homes[name].is_named:  # The trace goes with the rollouts that own it.
            return
        traces = candidate.spans.traces.items()
        own = [*candidate.spans.named, *(span for trace, spans in traces if trace not in shared for span in spans)]
        rollout = candidate.stored.rollout if candidate.stored else None
        last_ns = self._limits.over_since(rollout, max((span.arrived_ns for span in own), default=0))
        if own and last_ns is not None and self._must_go(last_ns):
            self._mark(name, own, is_stored=rollout is not None)

    def _mark(self, name: str, spans: list[IndexedSpan], *, is_stored: bool) -> None:
        self._marked[name] = spans
        self._recent.add(name)
        self._marked_stored += [name] if is_stored else []
        homes = {span.home for span in spans} & self._homes.keys()
        self._gone |= {home for home in homes if not self._homes[home].is_mixed}
        self._rollouts += 1
        self._spans += len(spans)
        self._excess_bytes -= sum(span.size + SPAN_OVERHEAD_BYTES for span in spans)

    def _delete_marked(self) -> None:
        self._delete([span for spans in self._marked.values() for span in spans])
        self._delete_rollouts(self._marked_stored)
        self._marked.clear()
        self._marked_stored.clear()

    def _delete(self, spans: Sequence[IndexedSpan]) -> None:
        # First the entries that protect other spans, last those that point at these: a failure leaves no orphans.
        self._db.run([(_DELETE_TRACE, key) for key in {(s.span[:16], s.home) for s in spans if s.is_named}])
        scanned = [span for span in spans if span.home in self._homes]  # Not the ones that arrived after the scan.
        partitions = {(s.home, s.bucket) for s in scanned if not self._homes[s.home].is_mixed}
        keys = [(self._homes[home].written_us, home, bucket) for home, bucket in sorted(partitions, reverse=True)]
        mixed = [span for span in scanned if self._homes[span.home].is_mixed]
        rows = [(self._homes[span.home].written_us, span.home, span.bucket, span.span) for span in mixed]
        self._db.run([(query, key) for query in _DELETE_PARTITION for key in keys])
        self._db.run([(query, row) for query in _DELETE_SPAN for row in rows])
        self._db.run(_delete_responses(spans))

    def _delete_rollouts(self, rollout_ids: Sequence[str]) -> None:
        """Delete these rollouts with their attempts."""
        found = [stored for stored in partition.read(self._db, rollout_ids) if stored]
        self._db.run([(partition.DELETE, (stored.rollout.rollout_id,)) for stored in found])
        grouped = [(stored.rollout.group_id, stored.place, stored.rollout.rollout_id) for stored in found]
        self._db.run([(_DELETE_FROM_GROUP, key) for key in grouped if key[0] is not None])

    def _delete_without_spans(self) -> int:
        """Delete the rollouts that are over and have no spans, and old decisions; returns the number of rollouts."""
        rollout_ids = [
            rollout_id
            for rollout_id, state, ended_ns in self._db.scan(_ROLLOUTS)
            if state is not None and RolloutState(state).is_over and ended_ns < self._limits.before_ns
            if rollout_id not in self._homes
        ]
        self._delete_rollouts(rollout_ids)
        delete_decisions(self._db, self._limits.before_ns)
        return len(rollout_ids)


def delete_spans(db: Keyspace, rollout_id: str, damaged: set[bytes]) -> None:
    """Delete the spans of a rollout, except those of traces that others own too, and these damaged ones."""
    found = membership.find_spans(db, [rollout_id])[rollout_id]
    shared = {trace for trace, owners in membership.find_owners(db, found).items() if owners - {rollout_id}}
    spans = [span for span in found.all() if span.span in damaged or span.is_named or span.trace not in shared]
    db.run([(_DELETE_TRACE, key) for key in {(span.span[:16], span.home) for span in spans if span.is_named}])
    now_us = db.now_ns() // 1000
    db.run([(query, (now_us, span.home, span.bucket, span.span)) for query in _DELETE_SPAN for span in spans])
    db.run(_delete_responses(spans))


def _delete_responses(spans: Sequence[IndexedSpan]) -> Iterator[Statement]:
    for span in spans:
        if span.response_id:
            yield _DELETE_RESPONSE, (span.response_id, span.is_answer, span.start_ns, span.span)
