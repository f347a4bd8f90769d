"""The queue of rollouts in Cassandra. What events make of them is decided by `agl.store.rollout`."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from agl.errors import UnknownIdError
from agl.store import rollout as lifecycle
from agl.store.cassandra import partition
from agl.store.cassandra.database import Database, Row
from agl.store.cassandra.partition import SHARDS, Kept
from agl.store.columns import is_fresh
from agl.store.rollout import Attempt, Pair, Rollout
from agl.store.states import AttemptState, RolloutState

_SETTLED_NS: Final = 120 * 10**9
"""By then whoever queued a rollout, or began to, is done with it."""
_ROWS_AT_ONCE: Final = 100

_SLOTS = "SELECT slot FROM queue_slots WHERE queue = 0"
_WAITING = "SELECT place, rollout_id, number FROM queue WHERE slot = ?"
_ANY_WAITING = "SELECT place FROM queue WHERE slot = ? LIMIT 1"
_LEAVE = "DELETE FROM queue WHERE slot = ? AND place = ? AND rollout_id = ? AND number = ?"
_LEAVE_SLOT = "DELETE FROM queue_slots WHERE queue = 0 AND slot = ?"
_ADD_SLOT = "INSERT INTO queue_slots (queue, slot) VALUES (0, ?)"
_WATCHED = "SELECT rollout_id, number FROM watched WHERE shard = ?"
_UNWATCH = "DELETE FROM watched WHERE shard = ? AND rollout_id = ? AND number = ?"
_GROUP = "INSERT INTO rollout_groups (group_id, place, rollout_id) VALUES (?, ?, ?)"
_OF_GROUP = "SELECT rollout_id FROM rollout_groups WHERE group_id = ?"
_BEAT = "UPDATE rollouts SET heartbeat_ns = ? WHERE rollout_id = ? AND number = ?"
_STATES = "SELECT DISTINCT rollout_id, state FROM rollouts"


@dataclass(frozen=True, slots=True)
class _Hint:
    """A rollout may wait here for its attempt `number`."""

    place: int
    rollout_id: str
    number: int

    @property
    def key(self) -> tuple[int, int, str, int]:
        return partition.slot_of(self.place), self.place, self.rollout_id, self.number


def enqueue(db: Database, rows: Sequence[Row], now_ns: int) -> None:
    """Queue what `record.to_row` made, leaving ids alone that are there."""
    first = {row[0]: (row, now_ns + number) for number, row in reversed(list(enumerate(rows)))}
    known = {kept.rollout.rollout_id for kept in partition.read(db, list(first)) if kept}
    new = [pair for rollout_id, pair in first.items() if rollout_id not in known]
    hints = [hint for row, place in new for hint in partition.waiting(row[0], place, 1)]
    groups = [(_GROUP, (row[2], place, row[0])) for row, place in new if row[2] is not None]
    db.run([*hints, *groups])
    partition.add(db, new)


def lease(db: Database, worker_id: str, rollout_id: str | None, now_ns: int) -> Pair | None:
    if rollout_id is not None:
        (kept,) = partition.read(db, [rollout_id])
        return _begin(db, kept, worker_id, now_ns) if kept else None
    for hint in _hints(db, now_ns):
        (kept,) = partition.read(db, [hint.rollout_id])
        leased = _begin(db, kept, worker_id, now_ns) if kept else None
        if leased or _is_stale(hint, kept, now_ns):
            db.write(_LEAVE, *hint.key)
        if leased:
            return leased
    return None


def heartbeat(db: Database, attempt_ids: Sequence[str], now_ns: int) -> list[str]:
    """Beat for attempts that have to be known; returns those that are over."""
    attempts = _find(db, attempt_ids)
    for attempt_id in attempt_ids:
        if attempt_id not in attempts:
            raise UnknownIdError(f"the store holds no attempt {attempt_id!r}")
    return [attempt_id for attempt_id in attempt_ids if not _beat(db, *attempts[attempt_id], now_ns)]


def beat_by_spans(db: Database, attempt_ids: Sequence[str], now_ns: int) -> None:
    """Beat for those of the attempts that are known."""
    for kept, attempt in _find(db, attempt_ids).values():
        _beat(db, kept, attempt, now_ns)


def finish(db: Database, attempt_id: str, state: AttemptState, error: str | None, now_ns: int) -> Rollout:
    if attempt_id not in _find(db, [attempt_id]):
        raise UnknownIdError(f"the store holds no attempt {attempt_id!r}")

    def decide(kept: Kept) -> Pair | None:
        attempt = kept.attempt(attempt_id)
        return lifecycle.finish(kept.rollout, attempt, state, error, now_ns) if attempt else None

    changed = partition.change(db, partition.rollout_id_of(attempt_id), decide)
    if changed is None:
        raise UnknownIdError(f"the store holds no attempt {attempt_id!r}")
    return changed[0]


def cancel(db: Database, rollout_ids: Sequence[str], now_ns: int) -> None:
    partition.need(db, rollout_ids)
    for rollout_id in rollout_ids:
        partition.change(db, rollout_id, lambda kept: lifecycle.cancel(kept.rollout, kept.last, now_ns))


def end_overdue(db: Database, now_ns: int) -> list[Attempt]:
    rows = db.run([(_WATCHED, (shard,)) for shard in range(SHARDS)])
    watched = [(rollout_id, number) for found in rows for rollout_id, number in found]
    ended: list[Attempt] = []
    for (rollout_id, number), kept in zip(watched, partition.read(db, [name for name, _ in watched]), strict=True):
        if kept is None or _is_past(kept, number):
            db.write(_UNWATCH, partition.shard_of(rollout_id), rollout_id, number)
            continue
        if _expire(kept, number, now_ns) is None:
            continue
        changed = partition.change(db, rollout_id, lambda kept, number=number: _expire(kept, number, now_ns))
        if changed:
            ended.append(changed[1])
    return sorted(ended, key=lambda attempt: attempt.attempt_id)


def query_group(db: Database, group_id: str) -> list[Rollout]:
    names = dict.fromkeys(rollout_id for (rollout_id,) in db.read(_OF_GROUP, group_id))
    found = [kept for kept in partition.read(db, list(names)) if kept]
    return [kept.rollout for kept in sorted(found, key=lambda kept: kept.place) if kept.rollout.group_id == group_id]


def count(db: Database) -> dict[RolloutState, int]:
    found = Counter(state for _, state in db.scan(_STATES))
    return {state: found[state] for state in RolloutState}


def _hints(db: Database, now_ns: int) -> Iterator[_Hint]:
    """Where rollouts may wait, by place."""
    for (slot,) in db.read(_SLOTS):
        is_empty = True
        for row in db.scan(_WAITING, slot, rows=_ROWS_AT_ONCE):
            is_empty = False
            yield _Hint(*row)
        if is_empty and slot < partition.slot_of(now_ns - _SETTLED_NS):
            db.write(_LEAVE_SLOT, slot)
            if db.read(_ANY_WAITING, slot):  # It came between: a rollout that is tried again keeps its place.
                db.write(_ADD_SLOT, slot)


def _is_stale(hint: _Hint, kept: Kept | None, now_ns: int) -> bool:
    """Whether nothing will ever wait here: what is queued or about to be, by another at this moment, may."""
    if kept is None:
        return hint.place < now_ns - _SETTLED_NS
    return kept.rollout.state.is_over or kept.rollout.attempts >= hint.number


def _begin(db: Database, kept: Kept, worker_id: str, now_ns: int) -> Pair | None:
    while kept.rollout.state is RolloutState.QUEUED:
        leased = lifecycle.begin(kept.rollout, worker_id, now_ns)
        if partition.swap(db, kept, *leased):
            return leased
        (again,) = partition.read(db, [kept.rollout.rollout_id])
        if again is None:
            return None
        kept = again
    return None


def _find(db: Database, attempt_ids: Sequence[str]) -> dict[str, tuple[Kept, Attempt]]:
    """Those that are known."""
    found: dict[str, tuple[Kept, Attempt]] = {}
    names = [partition.rollout_id_of(attempt_id) for attempt_id in attempt_ids]
    for attempt_id, kept in zip(attempt_ids, partition.read(db, names), strict=True):
        attempt = kept.attempt(attempt_id) if kept else None
        if kept and attempt:
            found[attempt_id] = (kept, attempt)
    return found


def _beat(db: Database, kept: Kept, attempt: Attempt, now_ns: int) -> bool:
    """Whether the attempt runs, or runs again."""
    if is_fresh(attempt, now_ns):
        return True
    if attempt.state is AttemptState.RUNNING:
        # A column of its own, which no condition asks for: no transaction.
        db.write(_BEAT, max(now_ns, attempt.heartbeat_ns), attempt.rollout_id, attempt.number)
        return True

    def decide(kept: Kept) -> Pair | None:
        current = kept.attempt(attempt.attempt_id)
        return lifecycle.beat(kept.rollout, current, now_ns) if current else None

    return lifecycle.beat(kept.rollout, attempt, now_ns) is not None and (
        partition.change(db, attempt.rollout_id, decide) is not None
    )


def _is_past(kept: Kept, number: int) -> bool:
    """Whether the attempt of that number cannot be overdue any more."""
    attempt = kept.attempts[number - 1] if number <= len(kept.attempts) else None
    is_running = attempt is None or attempt.state is AttemptState.RUNNING
    return kept.rollout.state.is_over or kept.rollout.attempts > number or not is_running


def _expire(kept: Kept, number: int, now_ns: int) -> Pair | None:
    attempt = kept.attempts[number - 1] if number <= len(kept.attempts) else None
    if attempt is None or attempt.state is not AttemptState.RUNNING:
        return None
    return lifecycle.expire(kept.rollout, attempt, now_ns)
