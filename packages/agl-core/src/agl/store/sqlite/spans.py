"""Spans in SQLite: each is kept as the OTLP request that would carry it alone, beside the columns that find it."""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any, Self

from agl.store.span_row import SpanRow

_INSERT = """
INSERT INTO spans (trace_id, span_id, rollout_id, start_ns, arrived_ns, asked, answered, otlp)
VALUES {} ON CONFLICT (trace_id, span_id) DO NOTHING
"""
_INSERT_ASKS = "INSERT INTO new_asks VALUES {}"
_ROWS_AT_ONCE = 128
"""Rows of one statement. While it runs other threads may: after each it has to wait for them to let it go on."""

_OF_KEY = "(span.rollout_id = key OR (span.trace_id = key AND span.rollout_id IS NULL))"

WHOLE = f"""
WITH RECURSIVE whole (key) AS (
    VALUES (:rollout), (:trace)
    UNION
    SELECT span.trace_id FROM whole JOIN spans span ON {_OF_KEY}
    UNION
    SELECT answer.trace_id
    FROM whole JOIN spans span ON {_OF_KEY} JOIN spans answer ON answer.answered = span.asked
    WHERE answer.rollout_id IS NULL
      AND span.start_ns = (SELECT min(start_ns) FROM asks WHERE response_id = span.asked)
    UNION
    SELECT request.trace_id
    FROM whole JOIN spans span ON {_OF_KEY} JOIN asks ask ON ask.response_id = span.answered
    JOIN spans request ON (request.trace_id, request.span_id) = (ask.trace_id, ask.span_id)
    WHERE request.rollout_id IS NULL
      AND ask.start_ns = (SELECT min(start_ns) FROM asks WHERE response_id = span.answered)
)
"""
"""What makes up a rollout: its id as text, and as blobs the traces whose spans that name no rollout belong to it."""

_QUERY = f"""{WHOLE}
SELECT otlp, answered IS NOT NULL OR EXISTS (SELECT 1 FROM spans answer WHERE answer.answered = span.asked)
FROM whole JOIN spans span ON {_OF_KEY} ORDER BY start_ns, arrival
"""
"""Bodies, and whether each was looked up in `asks`, or ought to have been."""

_ASKS_PER_STEP = 100_000

_IDS = """
SELECT id FROM (
    SELECT rollout_id AS id, min(arrival) AS first FROM spans WHERE rollout_id IS NOT NULL GROUP BY rollout_id
    UNION ALL
    SELECT lower(hex(trace_id)), min(arrival) FROM spans GROUP BY trace_id HAVING max(rollout_id) IS NULL
) ORDER BY first
"""

_LAST = """
SELECT rollout_id, lower(hex(trace_id)) FROM spans
WHERE arrival = coalesce(
    (SELECT max(arrival) FROM spans INDEXED BY spans_by_rollout WHERE rollout_id IS NOT NULL),
    (SELECT max(arrival) FROM spans))
"""


@dataclass(frozen=True, slots=True)
class Values:
    """Rows as the tables take them, made before the transaction begins."""

    spans: list[tuple[Any, ...]]
    asks: list[tuple[Any, ...]]

    @classmethod
    def of(cls, rows: Sequence[SpanRow], now_ns: int) -> Self:
        return cls(
            [
                (row.trace_id, row.span_id, row.rollout_id, row.start_ns, now_ns, row.asked, row.answered, row.otlp)
                for row in rows
            ],
            [(row.asked, row.start_ns, row.trace_id, row.span_id) for row in rows if row.asked],
        )


def insert(db: sqlite3.Connection, values: Values) -> int:
    """Keep spans that are not there yet; returns how many were new."""
    _insert_rows(db, _INSERT_ASKS, values.asks)
    return _insert_rows(db, _INSERT, values.spans)


def _insert_rows(db: sqlite3.Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> int:
    new = 0
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[first : first + _ROWS_AT_ONCE]
        new += db.execute(_of_rows(statement, len(some), len(some[0])), tuple(chain.from_iterable(some))).rowcount
    return new


@cache
def _of_rows(statement: str, rows: int, columns: int) -> str:
    """The statement for so many rows."""
    row = f"({', '.join('?' * columns)})"
    return statement.format(", ".join([row] * rows))


def sort_asks(db: sqlite3.Connection) -> bool:
    """Make some of the requests known by the answers that they asked for; returns whether there are more."""
    last, end = db.execute("SELECT min(rowid) + ?, max(rowid) FROM new_asks", (_ASKS_PER_STEP,)).fetchone()
    if end is None:
        return False
    db.execute("INSERT OR IGNORE INTO asks SELECT * FROM new_asks WHERE rowid <= ? ORDER BY response_id", (last,))
    db.execute("DELETE FROM new_asks WHERE rowid <= ?", (last,))
    return last < end


def query(db: sqlite3.Connection, rollout_id: str) -> list[bytes] | None:
    """Spans of a rollout, ordered; None where they can only be told once `sort_asks` has come to its end."""
    found = db.execute(_QUERY, keys(rollout_id)).fetchall()
    if any(looked_up for _, looked_up in found) and db.execute("SELECT 1 FROM new_asks LIMIT 1").fetchone():
        return None
    return [body for body, _ in found]


def last_rollout_id(db: sqlite3.Connection) -> str | None:
    found = db.execute(_LAST).fetchone()
    return (found[0] or found[1]) if found else None


def rollout_ids(db: sqlite3.Connection) -> list[str]:
    return [name for (name,) in db.execute(_IDS)]


def keys(rollout_id: str) -> dict[str, Any]:
    """Parameters of `WHOLE`: a rollout that no span names has the id of its trace."""
    return {"rollout": rollout_id, "trace": _trace(rollout_id)}


def _trace(rollout_id: str) -> bytes | None:
    try:
        return bytes.fromhex(rollout_id) if len(rollout_id) == 32 else None
    except ValueError:
        return None
