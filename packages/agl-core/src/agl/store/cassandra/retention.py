"""What `gc` deletes: rollouts that are over, the oldest first.

It reads what all spans are found by, once, which is exact without a second set of books, and then looks at homes by
the arrival of their last span. A home is deleted as of the time at which it was read: spans that come meanwhile stay.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from agl.store.cassandra import membership, partition
from agl.store.cassandra.database import Database, Statement
from agl.store.cassandra.home import Placed
from agl.store.cassandra.membership import Members
from agl.store.cassandra.partition import Kept
from agl.store.protocol import QUIET_S, Collected
from agl.store.states import RolloutState

_AT_ONCE: Final = 32
"""Rollouts that are looked at, and deleted, together: either is several requests one after the other."""
_SPAN_BYTES: Final = 300
"""About what a span takes up beside its body."""

_ALL = "SELECT home, span, arrived_ns, size, writetime(start_ns) FROM spans"
_ROLLOUTS = "SELECT DISTINCT rollout_id, state, ended_ns FROM rollouts"
_DELETE = (
    "DELETE FROM spans USING TIMESTAMP ? WHERE home = ? AND bucket = ? AND span = ?",
    "DELETE FROM span_bodies USING TIMESTAMP ? WHERE home = ? AND bucket = ? AND span = ?",
)
_DELETE_PARTITION = (
    "DELETE FROM spans USING TIMESTAMP ? WHERE home = ? AND bucket = ?",
    "DELETE FROM span_bodies USING TIMESTAMP ? WHERE home = ? AND bucket = ?",
)
_DELETE_RESPONSE = "DELETE FROM responses WHERE response_id = ? AND is_answer = ? AND start_ns = ? AND span = ?"
_DELETE_TRACE = "DELETE FROM traces WHERE trace_id = ? AND home = ?"
_DELETE_ROLLOUT = "DELETE FROM rollouts WHERE rollout_id = ?"
_DELETE_OF_GROUP = "DELETE FROM rollout_groups WHERE group_id = ? AND place = ? AND rollout_id = ?"


@dataclass(slots=True)
class _Home:
    """What a home held when it was read."""

    is_named: bool = False
    is_mixed: bool = False
    """Whether it is that of a trace, and of a rollout that is called like the trace."""
    last_ns: int = 0
    written_us: int = 0

    def add(self, is_named: bool, arrived_ns: int, written_us: int) -> None:
        self.is_mixed |= self.last_ns > 0 and is_named != self.is_named
        self.is_named |= is_named
        self.last_ns, self.written_us = max(self.last_ns, arrived_ns), max(self.written_us, written_us)


def collect(db: Database, older_than_s: float | None, max_bytes: int | None, now_ns: int) -> Collected:
    """See `Store.gc`."""
    before_ns = 0 if older_than_s is None else now_ns - int(older_than_s * 1e9)
    homes: dict[str, _Home] = defaultdict(_Home)
    used = 0
    for name, span, arrived_ns, size, written_us in db.scan(_ALL):
        if span is not None and arrived_ns is not None:
            homes[name].add(name != span[:16].hex(), arrived_ns, written_us)
            used += size + _SPAN_BYTES
    sweep = _Sweep(db, homes, before_ns, now_ns, 0 if max_bytes is None else used - max_bytes)
    sweep.run()
    return Collected(sweep.rollouts + _collect_without_spans(db, homes, before_ns), sweep.spans)


@dataclass(frozen=True, slots=True)
class _Look:
    """What was found of a rollout, or of a trace that names none."""

    members: Members
    owners: dict[str, set[str]]
    kept: Kept | None

    def shared(self, name: str) -> set[str]:
        """Traces of it that others may own as well."""
        return {trace for trace in self.members.traces if self.owners[trace] - {name}}


@dataclass(slots=True)
class _Sweep:
    """One walk over homes."""

    db: Database
    homes: dict[str, _Home]
    before_ns: int
    now_ns: int
    excess: int
    """Bytes that have to go."""
    rollouts: int = 0
    spans: int = 0
    _gone: set[str] = field(default_factory=set)
    """Homes of which nothing is left, or nothing will be."""
    _recent: set[str] = field(default_factory=set)
    """Rollouts that were doomed since the looks at hand."""
    _doomed: dict[str, list[Placed]] = field(default_factory=dict)
    """Spans of the rollouts that are to be deleted next, together."""
    _over: list[str] = field(default_factory=list)
    """Those of them that were queued once."""

    def run(self) -> None:
        names = sorted(self.homes, key=lambda name: self.homes[name].last_ns)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for first in range(0, len(names), _AT_ONCE):
                some = [name for name in names[first : first + _AT_ONCE] if self._is_next(name)]
                if some:
                    self._recent.clear()
                    for name, look in zip(some, pool.map(self._look, some), strict=True):
                        self._judge(name, look)
                    self._delete_doomed()

    def _is_next(self, name: str) -> bool:
        return name not in self._gone and self._is_wanted(self.homes[name].last_ns)

    def _is_wanted(self, last_ns: int) -> bool:
        return last_ns < self.before_ns or self.excess > 0

    def _look(self, name: str) -> _Look:
        members = membership.members(self.db, name)
        (kept,) = partition.read(self.db, [name])
        return _Look(members, membership.owners(self.db, members), kept)

    def _judge(self, name: str, look: _Look) -> None:
        """Doom a rollout, if it is to go."""
        if not self._is_next(name):
            return
        if any(owners & self._recent for owners in look.owners.values()):
            self._delete_doomed()  # Else what they share would be left to nobody.
            look = self._look(name)
        members, shared = look.members, look.shared(name)
        if shared and not self.homes[name].is_named:  # It goes with those who name it.
            return
        own = [*members.named, *(s for trace, spans in members.traces.items() if trace not in shared for s in spans)]
        last_ns = self._over_since(look.kept, own)
        if not own or last_ns is None or not self._is_wanted(last_ns):
            return
        self._doomed[name] = own
        self._recent.add(name)
        self._over += [name] if look.kept else []
        self._gone |= {span.home for span in own if span.home in self.homes and not self.homes[span.home].is_mixed}
        self.rollouts += 1
        self.spans += len(own)
        self.excess -= sum(span.size + _SPAN_BYTES for span in own)

    def _over_since(self, kept: Kept | None, spans: Sequence[Placed]) -> int | None:
        """When a rollout ended or was last heard of; None where it may go on."""
        last_ns = max((span.arrived_ns for span in spans), default=0)
        if kept is not None:
            return max(last_ns, kept.rollout.ended_ns or 0) if kept.rollout.state.is_over else None
        return last_ns if last_ns < self.now_ns - QUIET_S * 1e9 else None

    def _delete_doomed(self) -> None:
        self._delete([span for spans in self._doomed.values() for span in spans])
        delete_rollouts(self.db, self._over)
        self._doomed.clear()
        self._over.clear()

    def _delete(self, spans: Sequence[Placed]) -> None:
        # What protects others first, what only points at the spans last: if it ends between, nothing is left over.
        self.db.run([(_DELETE_TRACE, key) for key in {(s.span[:16], s.home) for s in spans if s.is_named}])
        seen = [span for span in spans if span.home in self.homes]  # What came since is left.
        partitions = {(s.home, s.bucket) for s in seen if not self.homes[s.home].is_mixed}
        keys = [(self.homes[name].written_us, name, bucket) for name, bucket in sorted(partitions, reverse=True)]
        rows = [(self.homes[s.home].written_us, s.home, s.bucket, s.span) for s in seen if self.homes[s.home].is_mixed]
        self.db.run([(query, key) for query in _DELETE_PARTITION for key in keys])
        self.db.run([(query, key) for query in _DELETE for key in rows])
        self.db.run([*_responses(spans)])


def delete_rollouts(db: Database, rollout_ids: Sequence[str]) -> None:
    """Forget these rollouts with their attempts."""
    found = [kept for kept in partition.read(db, rollout_ids) if kept]
    db.run([(_DELETE_ROLLOUT, (kept.rollout.rollout_id,)) for kept in found])
    grouped = [(kept.rollout.group_id, kept.place, kept.rollout.rollout_id) for kept in found]
    db.run([(_DELETE_OF_GROUP, key) for key in grouped if key[0] is not None])


def _responses(spans: Iterable[Placed]) -> Iterable[Statement]:
    for span in spans:
        if span.response_id:
            yield _DELETE_RESPONSE, (span.response_id, span.is_answer, span.start_ns, span.span)


def _collect_without_spans(db: Database, homes: dict[str, _Home], before_ns: int) -> int:
    """Delete the rollouts that are over and have no spans; returns how many."""
    over = [
        rollout_id
        for rollout_id, state, ended_ns in db.scan(_ROLLOUTS)
        if state is not None and RolloutState(state).is_over and ended_ns < before_ns
    ]
    without = [rollout_id for rollout_id in over if rollout_id not in homes]
    delete_rollouts(db, without)
    return len(without)
