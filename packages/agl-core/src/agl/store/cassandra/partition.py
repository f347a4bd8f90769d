"""A rollout with its attempts: one partition, changed by compare-and-set on its column `revision`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from uuid import UUID, uuid4

from agl.errors import UnknownIdError
from agl.store.cassandra.keyspace import Keyspace, Record, Statement, retry_conflicts
from agl.store.lifecycle import Pair
from agl.store.mapping import (
    ROLLOUT_COLUMNS,
    ROLLOUT_ROW,
    from_attempt,
    is_attempt,
    is_rollout,
    progress_checksum,
    to_rollout,
)
from agl.store.rollout import Attempt, Rollout
from agl.store.states import AttemptState, RolloutState

_SLOT_NS: Final = 60 * 10**9
"""The queue has a partition for each minute: the tombstones of old leases are not in the way of newer rollouts."""
WATCH_SHARDS: Final = 16
"""Partitions of the table `watched`."""

_ROLLOUT = f"{ROLLOUT_COLUMNS}, revision, place"
_ATTEMPT = "number, worker_id, attempt_state, started_ns, heartbeat_ns, attempt_ended_ns, error"
_READ = f"SELECT {_ROLLOUT}, {_ATTEMPT} FROM rollouts WHERE rollout_id = ?"
_STATIC_COLUMNS = len(_ROLLOUT.split(","))

_INSERT = f"""
INSERT INTO rollouts ({ROLLOUT_ROW}, revision, place) VALUES ({", ".join("?" * (_STATIC_COLUMNS + 2))}) IF NOT EXISTS
"""
_UPDATE = (
    "UPDATE rollouts SET revision = ?, max_attempts = ?, state = ?, attempts = ?, ended_ns = ?, progress_checksum = ?"
    " WHERE rollout_id = ? IF revision = ?"
)
_PUT_ATTEMPT = f"INSERT INTO rollouts (rollout_id, {_ATTEMPT}, attempt_checksum) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
DELETE = "DELETE FROM rollouts WHERE rollout_id = ?"
_DELETE_ATTEMPT = "DELETE FROM rollouts WHERE rollout_id = ? AND number = ?"
_ALL = f"SELECT {ROLLOUT_ROW}, {_ATTEMPT}, attempt_checksum FROM rollouts"
_PUT_QUEUE = "INSERT INTO queue (slot, place, rollout_id, number) VALUES (?, ?, ?, ?)"
PUT_SLOT = "INSERT INTO queue_slots (queue, slot) VALUES (0, ?)"
_PUT_WATCHED = "INSERT INTO watched (shard, rollout_id, number) VALUES (?, ?, ?)"


@dataclass(frozen=True, slots=True)
class StoredRollout:
    """A rollout as it was read. `place` is its constant position in the queue."""

    rollout: Rollout
    revision: UUID
    place: int
    attempts: tuple[Attempt, ...]

    @property
    def last(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    def attempt(self, attempt_id: str) -> Attempt | None:
        return next((attempt for attempt in self.attempts if attempt.attempt_id == attempt_id), None)

    def running(self, number: int) -> Attempt | None:
        """The attempt of this number if it runs."""
        attempt = self.attempts[number - 1] if number <= len(self.attempts) else None
        return attempt if attempt is not None and attempt.state is AttemptState.RUNNING else None


@dataclass(frozen=True, slots=True)
class DamagedRow:
    """A row that is not what was stored, a line about it, and the statement that deletes it."""

    finding: str
    row: Sequence[Any]
    delete: Statement


Changed = TypeVar("Changed", Pair, tuple[Rollout, Attempt | None])


def read(db: Keyspace, rollout_ids: Sequence[str]) -> list[StoredRollout | None]:
    """Each of these rollouts, or None if the store does not know it."""
    return [_to_stored(rows) for rows in db.run([(_READ, (rollout_id,)) for rollout_id in rollout_ids])]


def read_known(db: Keyspace, rollout_ids: Sequence[str]) -> list[StoredRollout]:
    """Raises UnknownIdError for a rollout that the store does not know."""
    known: list[StoredRollout] = []
    for rollout_id, stored in zip(rollout_ids, read(db, rollout_ids), strict=True):
        if stored is None:
            raise UnknownIdError(f"the store holds no rollout {rollout_id!r}")
        known.append(stored)
    return known


def rollout_id_of(attempt_id: str) -> str:
    return attempt_id.rpartition("-a")[0]


def change(
    db: Keyspace,
    rollout_id: str,
    decide: Callable[[StoredRollout], Changed | None],
    stored: StoredRollout | None = None,
) -> Changed | None:
    """Save the result of `decide`, a rollout and its attempt; None changes nothing. Returns that result.

    Calls `decide` with `stored`, if given, and with a new read after each conflict with another process. Raises
    UnknownIdError for a rollout that the store does not know.
    """
    reads = [] if stored is None else [stored]

    def change_once() -> tuple[bool, Changed | None]:
        current = reads.pop() if reads else read_known(db, [rollout_id])[0]
        changed = decide(current)
        return changed is None or _compare_and_set(db, current, *changed), changed

    return retry_conflicts(f"rollout {rollout_id}", change_once)


def insert(db: Keyspace, rows: Sequence[tuple[Record, int]]) -> None:
    """Store new rollouts, as `mapping.from_rollout` and place in the queue. Known ids stay as they are."""
    db.run([(_INSERT, (*row, uuid4(), place)) for row, place in rows])


def damaged(db: Keyspace) -> Iterator[DamagedRow]:
    """The rollouts and attempts whose rows are not what was stored."""
    columns, seen = len(ROLLOUT_ROW.split(",")), set[str]()
    for row in db.scan(_ALL):
        name, number, state = row[0], row[columns], row[columns + 2]
        if name not in seen and row[1] is not None and not is_rollout(row[:columns]):
            yield DamagedRow(f"the row of rollout {name} is damaged", row[:columns], (DELETE, (name,)))
        seen.add(name)
        attempt = (f"{name}-a{number}", name, *row[columns:])
        if state is not None and not is_attempt(attempt):
            yield DamagedRow(f"the row of attempt {attempt[0]} is damaged", attempt, (_DELETE_ATTEMPT, (name, number)))


def queue_entry(rollout_id: str, place: int, number: int) -> list[Statement]:
    """Statements that queue a rollout for its attempt `number`."""
    return [(_PUT_QUEUE, (slot_of(place), place, rollout_id, number)), (PUT_SLOT, (slot_of(place),))]


def slot_of(place: int) -> int:
    return place // _SLOT_NS


def shard_of(rollout_id: str) -> int:
    return sum(rollout_id.encode("utf-8", "replace")) % WATCH_SHARDS


def _compare_and_set(db: Keyspace, stored: StoredRollout, rollout: Rollout, attempt: Attempt | None) -> bool:
    """Replace `stored`; returns whether nobody has changed it since it was read."""
    if rollout == stored.rollout and attempt in (None, *stored.attempts):
        return True
    db.run(_index_entries(stored, rollout, attempt))
    revision = uuid4()
    progress = (rollout.max_attempts, rollout.state, rollout.attempts, rollout.ended_ns, progress_checksum(rollout))
    statements: list[Statement] = [(_UPDATE, (revision, *progress, rollout.rollout_id, stored.revision))]
    if attempt is not None:
        statements.append((_PUT_ATTEMPT, from_attempt(attempt)[1:]))
    return db.compare_and_set(statements, revision)


def _index_entries(stored: StoredRollout, rollout: Rollout, attempt: Attempt | None) -> list[Statement]:
    """Statements for `queue` and `watched`, to run before the change: an entry too many does no harm."""
    if rollout.state is RolloutState.QUEUED and stored.rollout.state is not RolloutState.QUEUED:
        return queue_entry(rollout.rollout_id, stored.place, rollout.attempts + 1)
    is_limited = rollout.timeout_s is not None or rollout.unresponsive_s is not None
    if attempt is not None and attempt.state is AttemptState.RUNNING and is_limited:
        return [(_PUT_WATCHED, (shard_of(rollout.rollout_id), rollout.rollout_id, attempt.number))]
    return []


def _to_stored(rows: Sequence[Record]) -> StoredRollout | None:
    # A heartbeat after the deletion of its rollout leaves a row with nothing else, which has no revision.
    if not rows or rows[0][_STATIC_COLUMNS - 2] is None:
        return None
    *columns, revision, place = rows[0][:_STATIC_COLUMNS]
    rollout = to_rollout(columns)
    attempts = (row[_STATIC_COLUMNS:] for row in rows)
    is_attempt = (row for row in attempts if row[0] is not None and row[2] is not None)
    return StoredRollout(rollout, revision, place, tuple(_to_attempt(rollout.rollout_id, *row) for row in is_attempt))


def _to_attempt(rollout_id: str, number: int, worker_id: str, state: str, *rest: Any) -> Attempt:
    return Attempt(f"{rollout_id}-a{number}", rollout_id, number, worker_id, AttemptState(state), *rest)
