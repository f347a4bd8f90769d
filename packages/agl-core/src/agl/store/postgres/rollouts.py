"""Rollouts and attempts in PostgreSQL. What an event makes of them is decided by `agl.store.rollout`.

Who changes a rollout or an attempt of it holds the lock of the rollout's row, and reads both under it; several are
locked in the order of their ids.
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple
from typing import Any, Final, LiteralString

from agl.errors import UnknownIdError
from agl.store import rollout as lifecycle
from agl.store.columns import ATTEMPT_COLUMNS, ROLLOUT_COLUMNS, is_fresh, to_attempt, to_rollout
from agl.store.postgres.database import Connection
from agl.store.rollout import Attempt, Rollout
from agl.store.states import AttemptState, RolloutState

ENDINGS: Final = "agl_endings"
"""Channel on which the store tells that rollouts may have ended."""

_ENQUEUE = f"""
INSERT INTO rollouts ({ROLLOUT_COLUMNS}) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (rollout_id) DO NOTHING
"""

_NEXT = f"SELECT {ROLLOUT_COLUMNS} FROM rollouts WHERE state = 'queued' ORDER BY place LIMIT 1 FOR UPDATE"
_NAMED = f"SELECT {ROLLOUT_COLUMNS} FROM rollouts WHERE state = 'queued' AND rollout_id = %s FOR UPDATE"
_LOCK = f"SELECT {ROLLOUT_COLUMNS} FROM rollouts WHERE rollout_id = ANY(%s) ORDER BY rollout_id FOR UPDATE"

_KEEP_ATTEMPT = f"""
INSERT INTO attempts ({ATTEMPT_COLUMNS}) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (attempt_id) DO UPDATE
SET state = excluded.state, heartbeat_ns = excluded.heartbeat_ns, ended_ns = excluded.ended_ns, error = excluded.error
"""


def enqueue(db: Connection, rows: Sequence[tuple[Any, ...]]) -> None:
    """Queue what `record.to_row` made, leaving ids alone that are there."""
    with db.cursor() as cursor:
        cursor.executemany(_ENQUEUE, rows)


def lease(db: Connection, worker_id: str, rollout_id: str | None, now_ns: int) -> tuple[Rollout, Attempt] | None:
    rollout = _next(db) if rollout_id is None else _first(db, _NAMED, rollout_id)
    if rollout is None:
        return None
    leased = lifecycle.begin(rollout, worker_id, now_ns)
    _keep(db, *leased)
    return leased


def _next(db: Connection) -> Rollout | None:
    """The rollout queued first that nobody else is about to take."""
    # Where others hold all that are queued, they may yet give one back: a heartbeat locks a row for a moment, too.
    return _first(db, f"{_NEXT} SKIP LOCKED") or _first(db, _NEXT)


def heartbeat(db: Connection, attempt_ids: Sequence[str], now_ns: int) -> list[str]:
    """Beat for attempts that have to be known; returns those that are over."""
    attempts = _find_attempts(db, attempt_ids)
    for attempt_id in attempt_ids:
        if attempt_id not in attempts:
            raise UnknownIdError(f"the store holds no attempt {attempt_id!r}")
    alive = _beat(db, attempts, now_ns)
    return [attempt_id for attempt_id in attempt_ids if attempt_id not in alive]


def beat_by_spans(db: Connection, attempt_ids: Sequence[str], now_ns: int) -> None:
    """Beat for those of the attempts that are known."""
    if attempt_ids:
        _beat(db, _find_attempts(db, attempt_ids), now_ns)


def finish(db: Connection, attempt_id: str, state: AttemptState, error: str | None, now_ns: int) -> Rollout:
    attempts = _find_attempts(db, [attempt_id])
    if not attempts:
        raise UnknownIdError(f"the store holds no attempt {attempt_id!r}")
    rollout_id = attempts[attempt_id].rollout_id
    rollout = _need(lock(db, [rollout_id]), rollout_id)
    attempt = _find_attempts(db, [attempt_id])[attempt_id]
    rollout, attempt = lifecycle.finish(rollout, attempt, state, error, now_ns)
    _keep(db, rollout, attempt)
    _announce(db)
    return rollout


def cancel(db: Connection, rollout_ids: Sequence[str], now_ns: int) -> None:
    locked = lock(db, rollout_ids)
    for rollout_id in rollout_ids:
        attempts = query_attempts(db, rollout_id)
        rollout, attempt = lifecycle.cancel(_need(locked, rollout_id), attempts[-1] if attempts else None, now_ns)
        locked[rollout_id] = rollout
        _keep(db, rollout, attempt)
    _announce(db)


def end_overdue(db: Connection, now_ns: int) -> list[Attempt]:
    running = db.execute(f"SELECT {ATTEMPT_COLUMNS} FROM attempts WHERE state = 'running'").fetchall()
    overdue = _overdue(db, map(to_attempt, running), now_ns)
    locked = lock(db, sorted({attempt.rollout_id for attempt in overdue}))
    found = _find_attempts(db, [attempt.attempt_id for attempt in overdue])  # Again: they may have ended meanwhile.
    ended: list[Attempt] = []
    for attempt in found.values():
        changed = lifecycle.expire(locked[attempt.rollout_id], attempt, now_ns) if _is_running(attempt) else None
        if changed:
            _keep(db, *changed)
            ended.append(changed[1])
    if ended:
        _announce(db)
    return ended


def get(db: Connection, rollout_id: str) -> Rollout | None:
    return _first(db, f"SELECT {ROLLOUT_COLUMNS} FROM rollouts WHERE rollout_id = %s", rollout_id)


def read(db: Connection, rollout_ids: Sequence[str]) -> list[Rollout]:
    """These rollouts, which have to be known."""
    found = _find(db, f"SELECT {ROLLOUT_COLUMNS} FROM rollouts WHERE rollout_id = ANY(%s)", rollout_ids)
    return [_need(found, rollout_id) for rollout_id in rollout_ids]


def lock(db: Connection, rollout_ids: Sequence[str]) -> dict[str, Rollout]:
    """Those of the rollouts that are known, theirs to change until the transaction ends."""
    return _find(db, _LOCK, rollout_ids)


def query_group(db: Connection, group_id: str) -> list[Rollout]:
    rows = db.execute(f"SELECT {ROLLOUT_COLUMNS} FROM rollouts WHERE group_id = %s ORDER BY place", (group_id,))
    return [to_rollout(row) for row in rows]


def query_attempts(db: Connection, rollout_id: str) -> list[Attempt]:
    rows = db.execute(f"SELECT {ATTEMPT_COLUMNS} FROM attempts WHERE rollout_id = %s ORDER BY number", (rollout_id,))
    return [to_attempt(row) for row in rows]


def count(db: Connection) -> dict[RolloutState, int]:
    found = dict(db.execute("SELECT state, count(*) FROM rollouts GROUP BY state").fetchall())
    return {state: found.get(state, 0) for state in RolloutState}


def _first(db: Connection, query: LiteralString, *values: Any) -> Rollout | None:
    row = db.execute(query, values).fetchone()
    return to_rollout(row) if row else None


def _find(db: Connection, query: LiteralString, rollout_ids: Sequence[str]) -> dict[str, Rollout]:
    rows = db.execute(query, (list(rollout_ids),))
    return {rollout.rollout_id: rollout for rollout in map(to_rollout, rows)}


def _need(found: dict[str, Rollout], rollout_id: str) -> Rollout:
    if rollout_id not in found:
        raise UnknownIdError(f"the store holds no rollout {rollout_id!r}")
    return found[rollout_id]


def _find_attempts(db: Connection, attempt_ids: Sequence[str]) -> dict[str, Attempt]:
    query = f"SELECT {ATTEMPT_COLUMNS} FROM attempts WHERE attempt_id = ANY(%s) ORDER BY attempt_id"
    rows = db.execute(query, (list(attempt_ids),))
    return {attempt.attempt_id: attempt for attempt in map(to_attempt, rows)}


def _beat(db: Connection, attempts: dict[str, Attempt], now_ns: int) -> set[str]:
    """Ids of those that run, or run again. Locks only the rollouts for which there is something to write."""
    alive = {attempt_id for attempt_id, attempt in attempts.items() if is_fresh(attempt, now_ns)}
    stale = [attempt for attempt_id, attempt in attempts.items() if attempt_id not in alive and _may_live(attempt)]
    if not stale:
        return alive
    locked = lock(db, sorted({attempt.rollout_id for attempt in stale}))
    for attempt in _find_attempts(db, [attempt.attempt_id for attempt in stale]).values():
        changed = lifecycle.beat(locked[attempt.rollout_id], attempt, now_ns)
        if changed:
            _keep(db, *changed)
            locked[attempt.rollout_id] = changed[0]
            alive.add(attempt.attempt_id)
    return alive


def _overdue(db: Connection, attempts: Iterable[Attempt], now_ns: int) -> list[Attempt]:
    by_rollout = {attempt.rollout_id: attempt for attempt in attempts}  # At most one of a rollout runs.
    rollouts = _find(db, f"SELECT {ROLLOUT_COLUMNS} FROM rollouts WHERE rollout_id = ANY(%s)", list(by_rollout))
    return [by_rollout[name] for name, rollout in rollouts.items() if _expires(rollout, by_rollout[name], now_ns)]


def _expires(rollout: Rollout, attempt: Attempt, now_ns: int) -> bool:
    # It may have ended between the two reads.
    return rollout.state is RolloutState.RUNNING and lifecycle.expire(rollout, attempt, now_ns) is not None


def _is_running(attempt: Attempt) -> bool:
    return attempt.state is AttemptState.RUNNING


def _may_live(attempt: Attempt) -> bool:
    return attempt.state in (AttemptState.RUNNING, AttemptState.UNRESPONSIVE)


def _keep(db: Connection, rollout: Rollout, attempt: Attempt | None) -> None:
    db.execute(
        "UPDATE rollouts SET state = %s, attempts = %s, ended_ns = %s WHERE rollout_id = %s",
        (rollout.state, rollout.attempts, rollout.ended_ns, rollout.rollout_id),
    )
    if attempt is not None:
        db.execute(_KEEP_ATTEMPT, astuple(attempt))


def _announce(db: Connection) -> None:
    """Wake those who wait, once this is committed."""
    db.execute(f"NOTIFY {ENDINGS}")
