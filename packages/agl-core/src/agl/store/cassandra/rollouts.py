"""The verbs for rollouts in Cassandra. `agl.store.lifecycle` decides how an event changes them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from agl.errors import UnknownIdError
from agl.store import lifecycle
from agl.store.cassandra import partition
from agl.store.cassandra.keyspace import Keyspace
from agl.store.cassandra.partition import WATCH_SHARDS, StoredRollout
from agl.store.end_notifier import EndNotifier
from agl.store.lifecycle import Pair, SpanHeartbeats
from agl.store.mapping import from_rollout
from agl.store.rollout import Attempt, Rollout
from agl.store.states import AttemptState, RolloutState

_SETTLED_NS: Final = 120 * 10**9
"""After this time no process is still in the middle of queueing a rollout."""
_PAGE_ROWS: Final = 100

_SLOTS = "SELECT slot FROM queue_slots WHERE queue = 0"
_ENTRIES = "SELECT place, rollout_id, number FROM queue WHERE slot = ?"
_ANY_ENTRY = "SELECT place FROM queue WHERE slot = ? LIMIT 1"
_DELETE_ENTRY = "DELETE FROM queue WHERE slot = ? AND place = ? AND rollout_id = ? AND number = ?"
_DELETE_SLOT = "DELETE FROM queue_slots WHERE queue = 0 AND slot = ?"
_WATCHED = "SELECT rollout_id, number FROM watched WHERE shard = ?"
_DELETE_WATCHED = "DELETE FROM watched WHERE shard = ? AND rollout_id = ? AND number = ?"
_PUT_GROUP = "INSERT INTO rollout_groups (group_id, place, rollout_id) VALUES (?, ?, ?)"
_GROUP = "SELECT rollout_id FROM rollout_groups WHERE group_id = ?"
_HEARTBEAT = "UPDATE rollouts SET heartbeat_ns = ? WHERE rollout_id = ? AND number = ?"
_STATES = "SELECT DISTINCT rollout_id, state FROM rollouts"


@dataclass(frozen=True, slots=True)
class _QueueEntry:
    """A rollout that may be queued for its attempt `number`."""

    place: int
    rollout_id: str
    number: int

    @property
    def key(self) -> tuple[int, int, str, int]:
        return partition.slot_of(self.place), self.place, self.rollout_id, self.number

    def is_stale(self, stored: StoredRollout | None, now_ns: int) -> bool:
        """Whether the rollout will never be queued for this attempt. One that is being queued just now still may."""
        if stored is None:
            return self.place < now_ns - _SETTLED_NS
        return stored.rollout.state.is_over or stored.rollout.attempts >= self.number


class CassandraRollouts:
    """The verbs of `Store` for rollouts and attempts."""

    _keyspace: Keyspace
    _ends: EndNotifier

    def enqueue_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        db, now_ns = self._keyspace, self._keyspace.now_ns()
        rows = [(from_rollout(rollout), now_ns + number) for number, rollout in enumerate(rollouts)]
        first = {row[0]: (row, place) for row, place in reversed(rows)}
        known = {stored.rollout.rollout_id for stored in partition.read(db, list(first)) if stored}
        new = [pair for rollout_id, pair in first.items() if rollout_id not in known]
        entries = [statement for row, place in new for statement in partition.queue_entry(row[0], place, 1)]
        groups = [(_PUT_GROUP, (row[2], place, row[0])) for row, place in new if row[2] is not None]
        db.run([*entries, *groups])
        partition.insert(db, new)

    def lease_rollout(
        self, worker_id: str, rollout_id: str | None = None, run: str | None = None
    ) -> tuple[Rollout, Attempt] | None:
        db, now_ns = self._keyspace, self._keyspace.now_ns()
        if rollout_id is not None:
            (stored,) = partition.read(db, [rollout_id])
            return _begin(db, stored, worker_id, now_ns) if stored and _is_of(stored, run) else None
        for entry in _queue_entries(db, now_ns):
            (stored,) = partition.read(db, [entry.rollout_id])
            if stored and not _is_of(stored, run):
                continue
            leased = _begin(db, stored, worker_id, now_ns)
            if leased or entry.is_stale(stored, now_ns):
                db.write(_DELETE_ENTRY, *entry.key)
            if leased:
                return leased
        return None

    def heartbeat(self, attempt_ids: Sequence[str]) -> list[str]:
        db, now_ns = self._keyspace, self._keyspace.now_ns()
        attempts = _find(db, attempt_ids)
        for attempt_id in attempt_ids:
            if attempt_id not in attempts:
                raise _unknown_attempt(attempt_id)
        return [attempt_id for attempt_id in attempt_ids if not _record_heartbeat(db, *attempts[attempt_id], now_ns)]

    def finish_attempt(self, attempt_id: str, state: AttemptState, error: str | None = None) -> Rollout:
        db, now_ns = self._keyspace, self._keyspace.now_ns()
        if attempt_id not in _find(db, [attempt_id]):
            raise _unknown_attempt(attempt_id)

        def decide(stored: StoredRollout) -> Pair | None:
            attempt = stored.attempt(attempt_id)
            return lifecycle.finish(stored.rollout, attempt, state, error, now_ns) if attempt else None

        changed = partition.change(db, partition.rollout_id_of(attempt_id), decide)
        if changed is None:
            raise _unknown_attempt(attempt_id)
        self._ends.notify()
        return changed[0]

    def cancel_rollouts(self, rollout_ids: Sequence[str]) -> None:
        db, now_ns = self._keyspace, self._keyspace.now_ns()
        partition.read_known(db, rollout_ids)
        for rollout_id in rollout_ids:
            partition.change(db, rollout_id, lambda stored: lifecycle.cancel(stored.rollout, stored.last, now_ns))
        self._ends.notify()

    def end_overdue_attempts(self, now_ns: int | None = None) -> list[Attempt]:
        ended = _end_overdue(self._keyspace, now_ns or self._keyspace.now_ns())
        self._ends.notify()
        return ended

    def wait_for_rollouts(self, rollout_ids: Sequence[str], timeout_s: float | None = None) -> list[Rollout]:
        over: dict[str, Rollout] = {}

        def read() -> list[Rollout]:
            left = [rollout_id for rollout_id in rollout_ids if rollout_id not in over]
            found = {s.rollout.rollout_id: s.rollout for s in partition.read_known(self._keyspace, left)}
            over.update({name: rollout for name, rollout in found.items() if rollout.state.is_over})
            return [over.get(rollout_id) or found[rollout_id] for rollout_id in rollout_ids]

        return self._ends.wait_until_over(read, timeout_s)

    def get_rollouts(self, rollout_ids: Sequence[str]) -> dict[str, Rollout]:
        found = partition.read(self._keyspace, rollout_ids)
        return {stored.rollout.rollout_id: stored.rollout for stored in found if stored}

    def query_rollouts(self, group_id: str) -> list[Rollout]:
        rollout_ids = dict.fromkeys(rollout_id for (rollout_id,) in self._keyspace.read(_GROUP, group_id))
        found = [stored for stored in partition.read(self._keyspace, list(rollout_ids)) if stored]
        found.sort(key=lambda stored: stored.place)
        return [stored.rollout for stored in found if stored.rollout.group_id == group_id]

    def query_attempts(self, rollout_id: str) -> list[Attempt]:
        (stored,) = partition.read(self._keyspace, [rollout_id])
        return list(stored.attempts) if stored else []

    def count_rollouts(self) -> dict[RolloutState, int]:
        found = Counter(state for _, state in self._keyspace.scan(_STATES))
        return {state: found[state] for state in RolloutState}


def heartbeat_by_span(db: Keyspace, attempt_ids: Sequence[str], now_ns: int, known: SpanHeartbeats) -> None:
    """Record a heartbeat of those attempts that the store knows, unless one was recorded a short time ago."""
    for stored, attempt in _find(db, known.due(attempt_ids, now_ns)).values():
        if _record_heartbeat(db, stored, attempt, now_ns):
            known.saved(stored.rollout, attempt.attempt_id, now_ns)


def _unknown_attempt(attempt_id: str) -> UnknownIdError:
    return UnknownIdError(f"the store holds no attempt {attempt_id!r}")


def _queue_entries(db: Keyspace, now_ns: int) -> Iterator[_QueueEntry]:
    """The entries of the queue by place."""
    for (slot,) in db.read(_SLOTS):
        is_empty = True
        for row in db.scan(_ENTRIES, slot, page_rows=_PAGE_ROWS):
            is_empty = False
            yield _QueueEntry(*row)
        if is_empty and slot < partition.slot_of(now_ns - _SETTLED_NS):
            db.write(_DELETE_SLOT, slot)
            if db.read(_ANY_ENTRY, slot):  # Added meanwhile: a rollout that is queued again keeps its place.
                db.write(partition.PUT_SLOT, slot)


def _is_of(stored: StoredRollout, run: str | None) -> bool:
    return run is None or stored.rollout.metadata.get("run") == run


def _begin(db: Keyspace, stored: StoredRollout | None, worker_id: str, now_ns: int) -> Pair | None:
    """Begin the next attempt of a rollout if it is queued."""

    def decide(stored: StoredRollout) -> Pair | None:
        is_queued = stored.rollout.state is RolloutState.QUEUED
        return lifecycle.begin(stored.rollout, worker_id, now_ns) if is_queued else None

    try:
        return partition.change(db, stored.rollout.rollout_id, decide, stored) if stored else None
    except UnknownIdError:  # Deleted meanwhile.
        return None


def _find(db: Keyspace, attempt_ids: Sequence[str]) -> dict[str, tuple[StoredRollout, Attempt]]:
    """The attempts that the store knows, with their rollouts."""
    found: dict[str, tuple[StoredRollout, Attempt]] = {}
    rollout_ids = [partition.rollout_id_of(attempt_id) for attempt_id in attempt_ids]
    for attempt_id, stored in zip(attempt_ids, partition.read(db, rollout_ids), strict=True):
        attempt = stored.attempt(attempt_id) if stored else None
        if stored and attempt:
            found[attempt_id] = (stored, attempt)
    return found


def _record_heartbeat(db: Keyspace, stored: StoredRollout, attempt: Attempt, now_ns: int) -> bool:
    """Returns whether the attempt runs, or runs again."""
    if lifecycle.is_fresh(attempt, now_ns):
        return True
    if attempt.state is AttemptState.RUNNING:
        # A plain write, not a transaction: no condition depends on this column.
        db.write(_HEARTBEAT, max(now_ns, attempt.heartbeat_ns), attempt.rollout_id, attempt.number)
        return True

    def decide(stored: StoredRollout) -> Pair | None:
        current = stored.attempt(attempt.attempt_id)
        return lifecycle.heartbeat(stored.rollout, current, now_ns) if current else None

    return partition.change(db, attempt.rollout_id, decide, stored) is not None


def _end_overdue(db: Keyspace, now_ns: int) -> list[Attempt]:
    watched = [key for rows in db.run([(_WATCHED, (shard,)) for shard in range(WATCH_SHARDS)]) for key in rows]
    ended: list[Attempt] = []
    for (rollout_id, number), stored in zip(watched, partition.read(db, [key[0] for key in watched]), strict=True):

        def expire(stored: StoredRollout, number: int = number) -> Pair | None:
            attempt = stored.running(number)
            return lifecycle.expire(stored.rollout, attempt, now_ns) if attempt else None

        if stored is None or _cannot_expire(stored, number):
            db.write(_DELETE_WATCHED, partition.shard_of(rollout_id), rollout_id, number)
            continue
        if changed := partition.change(db, rollout_id, expire, stored):
            ended.append(changed[1])
    return sorted(ended, key=lambda attempt: attempt.attempt_id)


def _cannot_expire(stored: StoredRollout, number: int) -> bool:
    """Whether the attempt of this number is over. One that is not stored yet may still begin."""
    has_ended = number <= len(stored.attempts) and stored.running(number) is None
    return stored.rollout.state.is_over or stored.rollout.attempts > number or has_ended
