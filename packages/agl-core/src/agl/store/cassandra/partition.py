"""A rollout with its attempts, as one partition that is changed where nobody has changed it meanwhile."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from uuid import UUID, uuid4

from agl.errors import StoreError, UnknownIdError
from agl.store.cassandra.database import Database, Row, Statement
from agl.store.columns import ROLLOUT_COLUMNS, to_rollout
from agl.store.rollout import Attempt, Pair, Rollout
from agl.store.states import AttemptState, RolloutState

_MOST_TRIES: Final = 50
_LONGEST_PAUSE_S: Final = 0.05

_SLOT_NS: Final = 60 * 10**9
"""The queue is kept by the minute, each a partition: what was leased long ago is in nobody's way."""
SHARDS: Final = 16
"""Partitions of `watched`."""

_OF_ROLLOUT = f"{ROLLOUT_COLUMNS}, revision, place"
_OF_ATTEMPT = "number, worker_id, attempt_state, started_ns, heartbeat_ns, attempt_ended_ns, error"
_READ = f"SELECT {_OF_ROLLOUT}, {_OF_ATTEMPT} FROM rollouts WHERE rollout_id = ?"
_STATICS = len(_OF_ROLLOUT.split(","))

_NEW = f"INSERT INTO rollouts ({_OF_ROLLOUT}) VALUES ({', '.join('?' * _STATICS)}) IF NOT EXISTS"
_MOVE = "UPDATE rollouts SET revision = ?, state = ?, attempts = ?, ended_ns = ? WHERE rollout_id = ? IF revision = ?"
_KEEP_ATTEMPT = f"INSERT INTO rollouts (rollout_id, {_OF_ATTEMPT}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_WAIT = "INSERT INTO queue (slot, place, rollout_id, number) VALUES (?, ?, ?, ?)"
_WAIT_SLOT = "INSERT INTO queue_slots (queue, slot) VALUES (0, ?)"
_WATCH = "INSERT INTO watched (shard, rollout_id, number) VALUES (?, ?, ?)"


@dataclass(frozen=True, slots=True)
class Kept:
    """A rollout as it was read. `place` is its place in the queue, which it keeps."""

    rollout: Rollout
    revision: UUID
    place: int
    attempts: tuple[Attempt, ...]

    @property
    def last(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    def attempt(self, attempt_id: str) -> Attempt | None:
        return next((attempt for attempt in self.attempts if attempt.attempt_id == attempt_id), None)


Changed = TypeVar("Changed", Pair, tuple[Rollout, Attempt | None])


def read(db: Database, rollout_ids: Sequence[str]) -> list[Kept | None]:
    """Each of these, or None where it is not known."""
    return [_to_kept(rows) for rows in db.run([(_READ, (rollout_id,)) for rollout_id in rollout_ids])]


def need(db: Database, rollout_ids: Sequence[str]) -> list[Kept]:
    """Raises UnknownIdError where one is not known."""
    found = [kept for kept in read(db, rollout_ids) if kept]
    if len(found) < len(rollout_ids):
        known = {kept.rollout.rollout_id for kept in found}
        missing = next(rollout_id for rollout_id in rollout_ids if rollout_id not in known)
        raise UnknownIdError(f"the store holds no rollout {missing!r}")
    return found


def rollout_id_of(attempt_id: str) -> str:
    return attempt_id.rpartition("-a")[0]


def change(db: Database, rollout_id: str, decide: Callable[[Kept], Changed | None]) -> Changed | None:
    """Do with a rollout, which has to be known, what `decide` makes of it and an attempt of it; None: nothing.

    `decide` is asked again where another has changed the rollout meanwhile; what it raises is raised here.
    """
    for _ in range(_MOST_TRIES):
        (kept,) = need(db, [rollout_id])
        changed = decide(kept)
        if changed is None or swap(db, kept, *changed):
            return changed
        time.sleep(random.uniform(0, _LONGEST_PAUSE_S))
    raise StoreError(f"rollout {rollout_id} was changed by others {_MOST_TRIES} times in a row; try again")


def add(db: Database, rows: Sequence[tuple[Row, int]]) -> None:
    """Keep what `record.to_row` made with its place in the queue, leaving ids alone that are there."""
    db.run([(_NEW, (*row, uuid4(), place)) for row, place in rows])


def swap(db: Database, kept: Kept, rollout: Rollout, attempt: Attempt | None) -> bool:
    """Put these in place of `kept`; returns whether it still was as it was read."""
    if rollout == kept.rollout and attempt in (None, *kept.attempts):
        return True
    db.run(_hints(kept, rollout, attempt))
    revision = uuid4()
    moved = (revision, rollout.state, rollout.attempts, rollout.ended_ns, rollout.rollout_id, kept.revision)
    statements: list[Statement] = [(_MOVE, moved)]
    if attempt is not None:
        ended = (attempt.heartbeat_ns, attempt.ended_ns, attempt.error)
        began = (attempt.rollout_id, attempt.number, attempt.worker_id, attempt.state, attempt.started_ns)
        statements.append((_KEEP_ATTEMPT, (*began, *ended)))
    return db.compare_and_set(statements, revision)


def slot_of(place: int) -> int:
    return place // _SLOT_NS


def shard_of(rollout_id: str) -> int:
    return sum(rollout_id.encode("utf-8", "replace")) % SHARDS


def _hints(kept: Kept, rollout: Rollout, attempt: Attempt | None) -> list[Statement]:
    """Where the rollout is to be found if the change comes about: written before, so that none is missing."""
    if rollout.state is RolloutState.QUEUED and kept.rollout.state is not RolloutState.QUEUED:
        return waiting(rollout.rollout_id, kept.place, rollout.attempts + 1)
    is_limited = rollout.timeout_s is not None or rollout.unresponsive_s is not None
    if attempt is not None and attempt.state is AttemptState.RUNNING and is_limited:
        return [(_WATCH, (shard_of(rollout.rollout_id), rollout.rollout_id, attempt.number))]
    return []


def waiting(rollout_id: str, place: int, number: int) -> list[Statement]:
    return [(_WAIT, (slot_of(place), place, rollout_id, number)), (_WAIT_SLOT, (slot_of(place),))]


def _to_kept(rows: Sequence[Row]) -> Kept | None:
    # A heartbeat that came after a rollout was collected has left a row of nothing else.
    if not rows or rows[0][_STATICS - 2] is None:
        return None
    *columns, revision, place = rows[0][:_STATICS]
    rollout = to_rollout(columns)
    own = [row[_STATICS:] for row in rows]
    attempts = tuple(_to_attempt(rollout.rollout_id, *row) for row in own if row[0] is not None and row[2] is not None)
    return Kept(rollout, revision, place, attempts)


def _to_attempt(rollout_id: str, number: int, worker_id: str, state: str, *rest: Any) -> Attempt:
    return Attempt(f"{rollout_id}-a{number}", rollout_id, number, worker_id, AttemptState(state), *rest)
