"""The default store: one SQLite file (or memory), every verb of `agl.store.protocol`.

A span is kept as the OTLP request that would carry it alone, beside the columns that queries need.
"""

import json
import math
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from agl import otlp
from agl.errors import StoreError
from agl.span import Span
from agl.store.database import Database
from agl.store.protocol import Attempt, Resource, Rollout
from agl.store.states import (
    ATTEMPT_TRANSITIONS,
    ROLLOUT_TRANSITIONS,
    AttemptState,
    RolloutState,
    after_attempt,
    move,
)

_MIGRATIONS = (
    (
        """CREATE TABLE spans (
            arrival INTEGER PRIMARY KEY,
            trace_id BLOB NOT NULL,
            span_id BLOB NOT NULL,
            rollout_id TEXT NOT NULL,
            start_ns INTEGER NOT NULL,
            otlp BLOB NOT NULL,
            UNIQUE (trace_id, span_id))""",
        "CREATE INDEX spans_by_rollout ON spans (rollout_id)",
        """CREATE TABLE rollouts (
            place INTEGER PRIMARY KEY,
            rollout_id TEXT NOT NULL UNIQUE,
            input TEXT NOT NULL,
            group_id TEXT,
            mode TEXT NOT NULL,
            max_attempts INTEGER NOT NULL,
            state TEXT NOT NULL,
            metadata TEXT NOT NULL)""",
        "CREATE INDEX rollouts_by_state ON rollouts (state)",
        "CREATE INDEX rollouts_by_group ON rollouts (group_id)",
        """CREATE TABLE attempts (
            attempt_id TEXT PRIMARY KEY,
            rollout_id TEXT NOT NULL,
            number INTEGER NOT NULL,
            worker_id TEXT NOT NULL,
            state TEXT NOT NULL,
            started_ns INTEGER NOT NULL,
            heartbeat_ns INTEGER NOT NULL,
            ended_ns INTEGER,
            error TEXT,
            UNIQUE (rollout_id, number))""",
        "CREATE INDEX attempts_by_state ON attempts (state)",
        """CREATE TABLE resources (
            name TEXT NOT NULL,
            version INTEGER NOT NULL,
            uri TEXT NOT NULL,
            metadata TEXT NOT NULL,
            PRIMARY KEY (name, version)) WITHOUT ROWID""",
        """CREATE TABLE metrics (
            run TEXT NOT NULL,
            name TEXT NOT NULL,
            step INTEGER NOT NULL,
            value REAL,
            PRIMARY KEY (run, name, step)) WITHOUT ROWID""",
    ),
)

_ROLLOUT_COLUMNS = "rollout_id, input, group_id, mode, max_attempts, state, metadata"
_ATTEMPT_COLUMNS = "attempt_id, rollout_id, number, worker_id, state, started_ns, heartbeat_ns, ended_ns, error"


class SqliteStore:
    """A store in the file at `path` (`:memory:` for none), safe for several threads and processes.

    Raises StoreError when the file is not a store.
    """

    def __init__(self, path: str, *, uri: str) -> None:
        if not path:
            raise StoreError(f"store URI {uri!r} names no file; write sqlite:///path.db")
        self.uri = uri
        self._database = Database(path, _MIGRATIONS)

    def append_spans(self, spans: Sequence[Span]) -> int:
        rows = [_span_row(span) for span in spans]

        def insert(db: sqlite3.Connection) -> int:
            return db.executemany(
                "INSERT OR IGNORE INTO spans (trace_id, span_id, rollout_id, start_ns, otlp) VALUES (?, ?, ?, ?, ?)",
                rows,
            ).rowcount

        return self._database.write(insert) if rows else 0

    def query_spans(self, rollout_id: str) -> list[Span]:
        # A span that names no rollout has its trace id as rollout id.
        rows = self._rows(
            """SELECT otlp FROM spans WHERE rollout_id = :rollout OR rollout_id IN
               (SELECT lower(hex(trace_id)) FROM spans WHERE rollout_id = :rollout) ORDER BY start_ns, arrival""",
            {"rollout": rollout_id},
        )
        return otlp.decode(b"".join(body for (body,) in rows))

    def count_spans(self) -> int:
        return self._rows("SELECT count(*) FROM spans")[0][0]

    def last_rollout_id(self) -> str | None:
        rows = self._rows(
            "SELECT rollout_id FROM spans WHERE rollout_id <> lower(hex(trace_id)) ORDER BY arrival DESC LIMIT 1"
        ) or self._rows("SELECT rollout_id FROM spans ORDER BY arrival DESC LIMIT 1")
        return rows[0][0] if rows else None

    def enqueue_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        rows = [_rollout_row(rollout) for rollout in rollouts]
        insert = f"INSERT OR IGNORE INTO rollouts ({_ROLLOUT_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)"
        self._database.write(lambda db: db.executemany(insert, rows))

    def lease_rollout(self, worker_id: str, rollout_id: str | None = None) -> tuple[Rollout, Attempt] | None:
        return self._database.write(lambda db: _lease(db, worker_id, rollout_id))

    def heartbeat(self, attempt_id: str) -> None:
        self._database.write(lambda db: _heartbeat(db, attempt_id))

    def finish_attempt(self, attempt_id: str, state: AttemptState, error: str | None = None) -> Rollout:
        return self._database.write(lambda db: _finish(db, attempt_id, state, error))

    def cancel_rollouts(self, rollout_ids: Sequence[str]) -> None:
        def cancel(db: sqlite3.Connection) -> None:
            for rollout_id in rollout_ids:
                rollout = _need_rollout(db, rollout_id)
                if RolloutState.CANCELLED in ROLLOUT_TRANSITIONS[rollout.state]:
                    _set_rollout_state(db, rollout, RolloutState.CANCELLED)

        self._database.write(cancel)

    def requeue_stale(self, silent_for_ns: int) -> list[str]:
        oldest = time.time_ns() - silent_for_ns

        def end(db: sqlite3.Connection) -> list[str]:
            stale = db.execute(
                "SELECT attempt_id FROM attempts WHERE state = ? AND heartbeat_ns < ?", (AttemptState.RUNNING, oldest)
            ).fetchall()
            for (attempt_id,) in stale:
                _finish(db, attempt_id, AttemptState.TIMEOUT, f"no heartbeat for {silent_for_ns / 1e9:g} s")
            return [attempt_id for (attempt_id,) in stale]

        return self._database.write(end)

    def get_rollout(self, rollout_id: str) -> Rollout | None:
        return self._database.read(lambda db: _get_rollout(db, rollout_id))

    def query_rollouts(self, group_id: str) -> list[Rollout]:
        rows = self._rows(f"SELECT {_ROLLOUT_COLUMNS} FROM rollouts WHERE group_id = ? ORDER BY place", (group_id,))
        return [_to_rollout(row) for row in rows]

    def query_attempts(self, rollout_id: str) -> list[Attempt]:
        rows = self._rows(
            f"SELECT {_ATTEMPT_COLUMNS} FROM attempts WHERE rollout_id = ? ORDER BY number", (rollout_id,)
        )
        return [_to_attempt(row) for row in rows]

    def put_resource(self, resource: Resource) -> None:
        row = (resource.name, resource.version, resource.uri, _to_json(resource.metadata, resource.name))
        self._database.write(lambda db: db.execute("INSERT OR REPLACE INTO resources VALUES (?, ?, ?, ?)", row))

    def get_resource(self, name: str, version: int | None = None) -> Resource | None:
        rows = self._rows(
            """SELECT name, version, uri, metadata FROM resources
               WHERE name = :name AND version = coalesce(:version, version) ORDER BY version DESC LIMIT 1""",
            {"name": name, "version": version},
        )
        return Resource(*rows[0][:3], metadata=json.loads(rows[0][3])) if rows else None

    def append_metrics(self, run: str, step: int, metrics: Mapping[str, float]) -> None:
        rows = [(run, name, step, float(value)) for name, value in metrics.items()]
        self._database.write(lambda db: db.executemany("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?)", rows))

    def query_metrics(self, run: str) -> dict[str, list[tuple[int, float]]]:
        found: dict[str, list[tuple[int, float]]] = {}
        for name, step, value in self._rows(
            "SELECT name, step, value FROM metrics WHERE run = ? ORDER BY name, step", (run,)
        ):
            # SQLite keeps a NaN as NULL.
            found.setdefault(name, []).append((step, math.nan if value is None else value))
        return found

    def close(self) -> None:
        self._database.close()

    def _rows(self, query: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        return self._database.read(lambda db: db.execute(query, parameters).fetchall())


def _span_row(span: Span) -> tuple[bytes, bytes, str, int, bytes]:
    return (
        bytes.fromhex(span.trace_id),
        bytes.fromhex(span.span_id),
        span.rollout_id,
        span.start_ns,
        otlp.encode((span,)),
    )


def _rollout_row(rollout: Rollout) -> tuple[Any, ...]:
    return (
        rollout.rollout_id,
        _to_json(rollout.input, f"the input of rollout {rollout.rollout_id}"),
        rollout.group_id,
        rollout.mode,
        rollout.max_attempts,
        RolloutState.QUEUED,
        _to_json(rollout.metadata, f"the metadata of rollout {rollout.rollout_id}"),
    )


def _to_json(value: Any, what: str) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise StoreError(f"{what} is not a JSON value: {error}") from error


def _to_rollout(row: Sequence[Any]) -> Rollout:
    rollout_id, task, group_id, mode, max_attempts, state, metadata = row
    return Rollout(
        rollout_id, json.loads(task), group_id, mode, max_attempts, RolloutState(state), json.loads(metadata)
    )


def _to_attempt(row: Sequence[Any]) -> Attempt:
    attempt = Attempt(*row)
    return replace(attempt, state=AttemptState(attempt.state))


def _get_rollout(db: sqlite3.Connection, rollout_id: str) -> Rollout | None:
    row = db.execute(f"SELECT {_ROLLOUT_COLUMNS} FROM rollouts WHERE rollout_id = ?", (rollout_id,)).fetchone()
    return _to_rollout(row) if row else None


def _need_rollout(db: sqlite3.Connection, rollout_id: str) -> Rollout:
    rollout = _get_rollout(db, rollout_id)
    if rollout is None:
        raise StoreError(f"the store holds no rollout {rollout_id!r}")
    return rollout


def _need_attempt(db: sqlite3.Connection, attempt_id: str) -> Attempt:
    row = db.execute(f"SELECT {_ATTEMPT_COLUMNS} FROM attempts WHERE attempt_id = ?", (attempt_id,)).fetchone()
    if row is None:
        raise StoreError(f"the store holds no attempt {attempt_id!r}")
    return _to_attempt(row)


def _set_rollout_state(db: sqlite3.Connection, rollout: Rollout, target: RolloutState) -> Rollout:
    state = move(ROLLOUT_TRANSITIONS, rollout.state, target, f"rollout {rollout.rollout_id}")
    db.execute("UPDATE rollouts SET state = ? WHERE rollout_id = ?", (state, rollout.rollout_id))
    return replace(rollout, state=state)


def _first_queued(db: sqlite3.Connection) -> Rollout | None:
    row = db.execute(
        f"SELECT {_ROLLOUT_COLUMNS} FROM rollouts WHERE state = ? ORDER BY place LIMIT 1", (RolloutState.QUEUED,)
    ).fetchone()
    return _to_rollout(row) if row else None


def _lease(db: sqlite3.Connection, worker_id: str, rollout_id: str | None) -> tuple[Rollout, Attempt] | None:
    row = db.execute(
        f"""SELECT {_ROLLOUT_COLUMNS} FROM rollouts
            WHERE state = :state AND (:rollout IS NULL OR rollout_id = :rollout) ORDER BY place LIMIT 1""",
        {"state": RolloutState.QUEUED, "rollout": rollout_id},
    ).fetchone()
    if row is None:
        return None
    rollout = _set_rollout_state(db, _to_rollout(row), RolloutState.RUNNING)
    (tries,) = db.execute("SELECT count(*) FROM attempts WHERE rollout_id = ?", (rollout.rollout_id,)).fetchone()
    number, now = tries + 1, time.time_ns()
    attempt = Attempt(
        f"{rollout.rollout_id}-a{number}", rollout.rollout_id, number, worker_id, AttemptState.RUNNING, now, now
    )
    db.execute(
        "INSERT INTO attempts (attempt_id, rollout_id, number, worker_id, state, started_ns, heartbeat_ns)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (attempt.attempt_id, attempt.rollout_id, number, worker_id, attempt.state, now, now),
    )
    return rollout, attempt


def _heartbeat(db: sqlite3.Connection, attempt_id: str) -> None:
    attempt = _need_attempt(db, attempt_id)
    if attempt.state is not AttemptState.RUNNING:
        raise StoreError(f"attempt {attempt_id} is {attempt.state}; its worker has nothing left to do for it")
    db.execute("UPDATE attempts SET heartbeat_ns = ? WHERE attempt_id = ?", (time.time_ns(), attempt_id))


def _finish(db: sqlite3.Connection, attempt_id: str, target: AttemptState, error: str | None) -> Rollout:
    attempt = _need_attempt(db, attempt_id)
    state = move(ATTEMPT_TRANSITIONS, attempt.state, target, f"attempt {attempt_id}")
    db.execute(
        "UPDATE attempts SET state = ?, ended_ns = ?, error = ? WHERE attempt_id = ?",
        (state, time.time_ns(), error, attempt_id),
    )
    rollout = _need_rollout(db, attempt.rollout_id)
    if rollout.state is not RolloutState.RUNNING:  # Cancelled meanwhile: it stays so.
        return rollout
    return _set_rollout_state(db, rollout, after_attempt(state, attempt.number, rollout.max_attempts))
