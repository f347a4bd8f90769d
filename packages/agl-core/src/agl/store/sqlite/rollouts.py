"""Rollouts and attempts in SQLite. What an event makes of them is decided by `agl.store.rollout`."""

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from typing import Any

from agl.errors import UnknownIdError
from agl.store import rollout as lifecycle
from agl.store.columns import ATTEMPT_COLUMNS, ROLLOUT_COLUMNS, is_fresh, to_attempt, to_rollout
from agl.store.rollout import Attempt, Rollout
from agl.store.states import AttemptState, RolloutState

_KEEP_ATTEMPT = f"""
INSERT INTO attempts ({ATTEMPT_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (attempt_id) DO UPDATE
SET state = excluded.state, heartbeat_ns = excluded.heartbeat_ns, ended_ns = excluded.ended_ns, error = excluded.error
"""


def enqueue(db: sqlite3.Connection, rows: Sequence[tuple[Any, ...]]) -> None:
    """Queue what `to_row` made, leaving ids alone that are there."""
    db.executemany(
        f"INSERT INTO rollouts ({ROLLOUT_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (rollout_id) DO NOTHING",
        rows,
    )


def lease(
    db: sqlite3.Connection, worker_id: str, rollout_id: str | None, now_ns: int
) -> tuple[Rollout, Attempt] | None:
    row = db.execute(
        f"""SELECT {ROLLOUT_COLUMNS} FROM rollouts
            WHERE state = :state AND (:rollout IS NULL OR rollout_id = :rollout) ORDER BY place LIMIT 1""",
        {"state": RolloutState.QUEUED, "rollout": rollout_id},
    ).fetchone()
    if row is None:
        return None
    leased = lifecycle.begin(to_rollout(row), worker_id, now_ns)
    _keep(db, *leased)
    return leased


def heartbeat(db: sqlite3.Connection, attempt_ids: Iterable[str], now_ns: int) -> list[str]:
    """Beat for attempts that have to be known; returns those that are over."""
    attempts = [_need_attempt(db, attempt_id) for attempt_id in attempt_ids]
    return [attempt.attempt_id for attempt in attempts if not _beat(db, attempt, now_ns)]


def beat_by_spans(db: sqlite3.Connection, attempt_ids: Iterable[str], now_ns: int) -> None:
    """Beat for those of the attempts that are known."""
    for attempt_id in attempt_ids:
        attempt = _get_attempt(db, attempt_id)
        if attempt is not None:
            _beat(db, attempt, now_ns)


def finish(db: sqlite3.Connection, attempt_id: str, state: AttemptState, error: str | None, now_ns: int) -> Rollout:
    attempt = _need_attempt(db, attempt_id)
    rollout, attempt = lifecycle.finish(need(db, attempt.rollout_id), attempt, state, error, now_ns)
    _keep(db, rollout, attempt)
    return rollout


def cancel(db: sqlite3.Connection, rollout_ids: Iterable[str], now_ns: int) -> None:
    for rollout_id in rollout_ids:
        attempts = query_attempts(db, rollout_id)
        _keep(db, *lifecycle.cancel(need(db, rollout_id), attempts[-1] if attempts else None, now_ns))


def end_overdue(db: sqlite3.Connection, now_ns: int) -> list[Attempt]:
    running = db.execute(f"SELECT {ATTEMPT_COLUMNS} FROM attempts WHERE state = ?", (AttemptState.RUNNING,)).fetchall()
    ended: list[Attempt] = []
    for attempt in map(to_attempt, running):
        changed = lifecycle.expire(need(db, attempt.rollout_id), attempt, now_ns)
        if changed:
            _keep(db, *changed)
            ended.append(changed[1])
    return ended


def get(db: sqlite3.Connection, rollout_id: str) -> Rollout | None:
    row = db.execute(f"SELECT {ROLLOUT_COLUMNS} FROM rollouts WHERE rollout_id = ?", (rollout_id,)).fetchone()
    return to_rollout(row) if row else None


def need(db: sqlite3.Connection, rollout_id: str) -> Rollout:
    rollout = get(db, rollout_id)
    if rollout is None:
        raise UnknownIdError(f"the store holds no rollout {rollout_id!r}")
    return rollout


def query_group(db: sqlite3.Connection, group_id: str) -> list[Rollout]:
    rows = db.execute(f"SELECT {ROLLOUT_COLUMNS} FROM rollouts WHERE group_id = ? ORDER BY place", (group_id,))
    return [to_rollout(row) for row in rows]


def query_attempts(db: sqlite3.Connection, rollout_id: str) -> list[Attempt]:
    rows = db.execute(f"SELECT {ATTEMPT_COLUMNS} FROM attempts WHERE rollout_id = ? ORDER BY number", (rollout_id,))
    return [to_attempt(row) for row in rows]


def count(db: sqlite3.Connection) -> dict[RolloutState, int]:
    found = dict(db.execute("SELECT state, count(*) FROM rollouts GROUP BY state").fetchall())
    return {state: found.get(state, 0) for state in RolloutState}


def _get_attempt(db: sqlite3.Connection, attempt_id: str) -> Attempt | None:
    row = db.execute(f"SELECT {ATTEMPT_COLUMNS} FROM attempts WHERE attempt_id = ?", (attempt_id,)).fetchone()
    return to_attempt(row) if row else None


def _need_attempt(db: sqlite3.Connection, attempt_id: str) -> Attempt:
    attempt = _get_attempt(db, attempt_id)
    if attempt is None:
        raise UnknownIdError(f"the store holds no attempt {attempt_id!r}")
    return attempt


def _beat(db: sqlite3.Connection, attempt: Attempt, now_ns: int) -> bool:
    """Whether the attempt runs, or runs again."""
    if is_fresh(attempt, now_ns):
        return True
    changed = lifecycle.beat(need(db, attempt.rollout_id), attempt, now_ns)
    if changed:
        _keep(db, *changed)
    return changed is not None


def _keep(db: sqlite3.Connection, rollout: Rollout, attempt: Attempt | None) -> None:
    db.execute(
        "UPDATE rollouts SET state = ?, attempts = ?, ended_ns = ? WHERE rollout_id = ?",
        (rollout.state, rollout.attempts, rollout.ended_ns, rollout.rollout_id),
    )
    if attempt is not None:
        db.execute(_KEEP_ATTEMPT, astuple(attempt))
