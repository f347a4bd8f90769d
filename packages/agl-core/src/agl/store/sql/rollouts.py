"""Rollouts and attempts in an SQL database. `agl.store.lifecycle` decides how an event changes them.

A transaction that changes a rollout or an attempt of it first locks the row of the rollout, and then reads both. It
locks several rollouts in the order of their ids.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic

from agl.errors import UnknownIdError
from agl.store import lifecycle
from agl.store.end_notifier import EndNotifier
from agl.store.lifecycle import SpanHeartbeats
from agl.store.mapping import (
    ATTEMPT_COLUMNS,
    ATTEMPT_ROW,
    ROLLOUT_COLUMNS,
    ROLLOUT_ROW,
    from_attempt,
    from_rollout,
    progress_checksum,
    to_attempt,
    to_rollout,
)
from agl.store.rollout import Attempt, Rollout
from agl.store.sql.database import Connection, Database, DatabaseT, Result, write_many
from agl.store.states import AttemptState, RolloutState

_ENQUEUE = f"""
INSERT INTO rollouts ({ROLLOUT_ROW}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (rollout_id) DO NOTHING
"""
_QUEUED = f"SELECT {ROLLOUT_COLUMNS} FROM rollouts WHERE state = 'queued'"
_GROUP = f"SELECT {ROLLOUT_COLUMNS} FROM rollouts WHERE group_id = ? ORDER BY place"
_ATTEMPTS = f"SELECT {ATTEMPT_COLUMNS} FROM attempts WHERE rollout_id = ? ORDER BY number"
_RUNNING = f"SELECT {ATTEMPT_COLUMNS} FROM attempts WHERE state = 'running'"
_COUNT = "SELECT state, count(*) FROM rollouts GROUP BY state"
_UPDATE_ROLLOUT = """
UPDATE rollouts SET max_attempts = ?, state = ?, attempts = ?, ended_ns = ?, progress_checksum = ? WHERE rollout_id = ?
"""
_UPSERT_ATTEMPT = f"""
INSERT INTO attempts ({ATTEMPT_ROW}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (attempt_id) DO UPDATE
SET state = excluded.state, heartbeat_ns = excluded.heartbeat_ns, ended_ns = excluded.ended_ns, error = excluded.error,
    checksum = excluded.checksum
"""


class SqlRollouts(Generic[DatabaseT]):
    """The verbs of `Store` for rollouts and attempts, each in one transaction."""

    _database: DatabaseT
    _ends: EndNotifier

    def enqueue_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        write_many(self._database, _ENQUEUE, [from_rollout(rollout) for rollout in rollouts])

    def lease_rollout(
        self, worker_id: str, rollout_id: str | None = None, run: str | None = None
    ) -> tuple[Rollout, Attempt] | None:
        return self._database.write(lambda db: _lease(db, worker_id, rollout_id, run, self._database.now_ns()))

    def heartbeat(self, attempt_ids: Sequence[str]) -> list[str]:
        return self._database.write(lambda db: _heartbeat(db, attempt_ids, self._database.now_ns()))

    def finish_attempt(self, attempt_id: str, state: AttemptState, error: str | None = None) -> Rollout:
        rollout = self._database.write(lambda db: _finish(db, attempt_id, state, error, self._database.now_ns()))
        self._ends.notify()
        return rollout

    def cancel_rollouts(self, rollout_ids: Sequence[str]) -> None:
        self._database.write(lambda db: _cancel(db, rollout_ids, self._database.now_ns()))
        self._ends.notify()

    def end_overdue_attempts(self, now_ns: int | None = None) -> list[Attempt]:
        ended = self._database.write(lambda db: _end_overdue(db, now_ns or self._database.now_ns()))
        self._ends.notify()
        return ended

    def wait_for_rollouts(self, rollout_ids: Sequence[str], timeout_s: float | None = None) -> list[Rollout]:
        def read(db: Connection) -> list[Rollout]:
            found = _find_rollouts(db, rollout_ids)
            return [_known(found, rollout_id) for rollout_id in rollout_ids]

        return self._ends.wait_until_over(lambda: self._database.read(read), timeout_s)

    def get_rollouts(self, rollout_ids: Sequence[str]) -> dict[str, Rollout]:
        return self._database.read(lambda db: _find_rollouts(db, rollout_ids))

    def query_rollouts(self, group_id: str) -> list[Rollout]:
        return self._database.read(lambda db: [to_rollout(row) for row in db.execute(_GROUP, (group_id,))])

    def query_attempts(self, rollout_id: str) -> list[Attempt]:
        return self._database.read(lambda db: _query_attempts(db, rollout_id))

    def count_rollouts(self) -> dict[RolloutState, int]:
        found = dict(self._database.read(lambda db: db.execute(_COUNT).fetchall()))
        return {state: found.get(state, 0) for state in RolloutState}


def get_rollout(db: Connection, rollout_id: str) -> Rollout | None:
    return _find_rollouts(db, [rollout_id]).get(rollout_id)


def write_spans(
    database: Database,
    write: Callable[[Any], Result],
    attempt_ids: Sequence[str],
    now_ns: int,
    heartbeats: SpanHeartbeats,
) -> Result:
    """Run `write`, which writes spans of `attempt_ids`, and record heartbeats of those that are due and known."""
    due = heartbeats.due(attempt_ids, now_ns)

    def write_both(db: Connection) -> tuple[dict[str, Rollout], Result]:
        return _record_heartbeats(db, _find_attempts(db, due), now_ns)[1] if due else {}, write(db)

    saved, result = database.write(write_both)
    for attempt_id, rollout in saved.items():
        heartbeats.saved(rollout, attempt_id, now_ns)
    return result


def _lease(
    db: Connection, worker_id: str, rollout_id: str | None, run: str | None, now_ns: int
) -> tuple[Rollout, Attempt] | None:
    wanted = {"rollout_id": rollout_id, db.json_text("metadata", "run"): run}
    given = {column: value for column, value in wanted.items() if value is not None}
    conditions = "".join(f" AND {column} = ?" for column in given)
    row = db.lock_first(f"{_QUEUED}{conditions} ORDER BY place LIMIT 1", [*given.values()])
    if row is None:
        return None
    leased = lifecycle.begin(to_rollout(row), worker_id, now_ns)
    _save(db, *leased)
    return leased


def _heartbeat(db: Connection, attempt_ids: Sequence[str], now_ns: int) -> list[str]:
    """Returns the attempts that are over. Raises UnknownIdError for an id that the store does not know."""
    attempts = _find_attempts(db, attempt_ids)
    for attempt_id in attempt_ids:
        if attempt_id not in attempts:
            raise UnknownIdError(f"the store holds no attempt {attempt_id!r}")
    running, _ = _record_heartbeats(db, attempts, now_ns)
    return [attempt_id for attempt_id in attempt_ids if attempt_id not in running]


def _record_heartbeats(
    db: Connection, attempts: dict[str, Attempt], now_ns: int
) -> tuple[set[str], dict[str, Rollout]]:
    """Returns the ids of the attempts that run, or run again, and the rollouts of those that were written.

    Locks only the rollouts that have to be written.
    """
    saved: dict[str, Rollout] = {}
    running = {attempt_id for attempt_id, attempt in attempts.items() if lifecycle.is_fresh(attempt, now_ns)}
    may_run = (AttemptState.RUNNING, AttemptState.UNRESPONSIVE)
    stale = [attempt for name, attempt in attempts.items() if name not in running and attempt.state in may_run]
    if not stale:
        return running, saved
    rollouts = _find_rollouts(db, [attempt.rollout_id for attempt in stale], lock=True)
    for attempt in _find_attempts(db, [attempt.attempt_id for attempt in stale]).values():
        if changed := lifecycle.heartbeat(rollouts[attempt.rollout_id], attempt, now_ns):
            _save(db, *changed)
            rollouts[attempt.rollout_id] = changed[0]
            saved[attempt.attempt_id] = changed[0]
            running.add(attempt.attempt_id)
    return running, saved


def _finish(db: Connection, attempt_id: str, state: AttemptState, error: str | None, now_ns: int) -> Rollout:
    attempt = _find_attempts(db, [attempt_id]).get(attempt_id)
    if attempt is None:
        raise UnknownIdError(f"the store holds no attempt {attempt_id!r}")
    rollout = _known(_find_rollouts(db, [attempt.rollout_id], lock=True), attempt.rollout_id)
    attempt = _find_attempts(db, [attempt_id])[attempt_id]
    rollout, attempt = lifecycle.finish(rollout, attempt, state, error, now_ns)
    _save(db, rollout, attempt)
    db.notify_end()
    return rollout


def _cancel(db: Connection, rollout_ids: Sequence[str], now_ns: int) -> None:
    rollouts = _find_rollouts(db, rollout_ids, lock=True)
    for rollout_id in rollout_ids:
        attempts = _query_attempts(db, rollout_id)
        last = attempts[-1] if attempts else None
        rollouts[rollout_id], last = lifecycle.cancel(_known(rollouts, rollout_id), last, now_ns)
        _save(db, rollouts[rollout_id], last)
    db.notify_end()


def _end_overdue(db: Connection, now_ns: int) -> list[Attempt]:
    """Finds overdue attempts without a lock, then locks only their rollouts and checks the attempts again."""
    running = {attempt.rollout_id: attempt for attempt in map(to_attempt, db.execute(_RUNNING).fetchall())}
    overdue = [
        running[rollout_id]
        for rollout_id, rollout in _find_rollouts(db, running).items()
        if rollout.state is RolloutState.RUNNING and lifecycle.expire(rollout, running[rollout_id], now_ns)
    ]
    rollouts = _find_rollouts(db, [attempt.rollout_id for attempt in overdue], lock=True)
    ended: list[Attempt] = []
    for attempt in _find_attempts(db, [attempt.attempt_id for attempt in overdue]).values():
        is_running = attempt.state is AttemptState.RUNNING
        changed = lifecycle.expire(rollouts[attempt.rollout_id], attempt, now_ns) if is_running else None
        if changed:
            _save(db, *changed)
            ended.append(changed[1])
    if ended:
        db.notify_end()
    return ended


def _find_rollouts(db: Connection, rollout_ids: Iterable[str], *, lock: bool = False) -> dict[str, Rollout]:
    """The rollouts that the store knows, by id."""
    rows = db.select_by_id(ROLLOUT_COLUMNS, "rollouts", "rollout_id", rollout_ids, lock=lock)
    return {rollout.rollout_id: rollout for rollout in map(to_rollout, rows)}


def _find_attempts(db: Connection, attempt_ids: Iterable[str]) -> dict[str, Attempt]:
    """The attempts that the store knows, by id."""
    rows = db.select_by_id(ATTEMPT_COLUMNS, "attempts", "attempt_id", attempt_ids)
    return {attempt.attempt_id: attempt for attempt in map(to_attempt, rows)}


def _query_attempts(db: Connection, rollout_id: str) -> list[Attempt]:
    return [to_attempt(row) for row in db.execute(_ATTEMPTS, (rollout_id,))]


def _known(rollouts: dict[str, Rollout], rollout_id: str) -> Rollout:
    if rollout_id not in rollouts:
        raise UnknownIdError(f"the store holds no rollout {rollout_id!r}")
    return rollouts[rollout_id]


def _save(db: Connection, rollout: Rollout, attempt: Attempt | None) -> None:
    progress = (rollout.max_attempts, rollout.state, rollout.attempts, rollout.ended_ns, progress_checksum(rollout))
    db.execute(_UPDATE_ROLLOUT, (*progress, rollout.rollout_id))
    if attempt is not None:
        db.execute(_UPSERT_ATTEMPT, from_attempt(attempt))
