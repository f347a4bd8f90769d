"""Spans in SQLite: each row has the OTLP request that carries the span alone, and the columns to find it by.

`asks` indexes spans by the response that they requested. Response ids are random, so each insert into an index of them
writes a page of its own: `insert` appends to `new_asks`, and a query that needs the index first moves these rows to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any, Final, Self

from agl.store.membership import first_keys
from agl.store.span_row import SpanRow, checksum, verified
from agl.store.sql.database import Connection

_INSERT = """
INSERT INTO spans (trace_id, span_id, rollout_id, start_ns, arrived_ns, asked, answered, checksum, otlp)
VALUES {} ON CONFLICT (trace_id, span_id) DO NOTHING
"""
_INSERT_ASKS = "INSERT INTO new_asks VALUES {}"
_ROWS_PER_STATEMENT: Final = 128
"""A statement runs without the GIL and waits for it afterwards: fewer statements wait less often."""

_SPANS_OF_MEMBER = "(span.rollout_id = member.rollout OR (span.trace_id = member.trace AND span.rollout_id IS NULL))"

MEMBERS: Final = f"""
WITH RECURSIVE member (rollout, trace) AS (
    VALUES (:rollout, NULL), (NULL, :trace)
    UNION
    SELECT NULL, span.trace_id FROM member JOIN spans span ON {_SPANS_OF_MEMBER}
    UNION
    SELECT NULL, answer.trace_id
    FROM member JOIN spans span ON {_SPANS_OF_MEMBER} JOIN spans answer ON answer.answered = span.asked
    WHERE answer.rollout_id IS NULL
      AND span.arrival = (SELECT min(arrival) FROM asks WHERE response_id = span.asked)
    UNION
    SELECT NULL, request.trace_id
    FROM member JOIN spans span ON {_SPANS_OF_MEMBER}
    JOIN spans request ON request.arrival = (SELECT min(arrival) FROM asks WHERE response_id = span.answered)
    WHERE request.rollout_id IS NULL
)
"""
"""The keys of a rollout by the rule of `agl.store.membership`; parameters are `first_keys`."""

QUERY: Final = f"""{MEMBERS}
SELECT otlp, checksum, trace_id, span_id, start_ns,
    answered IS NOT NULL OR EXISTS (SELECT 1 FROM spans answer WHERE answer.answered = span.asked)
FROM member JOIN spans span ON {_SPANS_OF_MEMBER} ORDER BY start_ns, arrival
"""
"""The spans of a rollout as `span_row.Stored`, and whether the result depends on `asks`."""

LAST_SPAN: Final = "SELECT rollout_id, trace_id FROM spans ORDER BY arrival DESC LIMIT 1"

_ASKS_PER_STEP = 100_000

NEW_ASKS: Final = """
SELECT new.response_id, span.arrival
FROM main.new_asks new JOIN main.spans span ON (span.trace_id, span.span_id) = (new.trace_id, new.span_id)
"""
"""The rows of `new_asks` as rows of `asks`."""

_SHADOWS: Final = (
    f"CREATE TEMP VIEW IF NOT EXISTS asks AS SELECT * FROM main.asks UNION ALL {NEW_ASKS}",
    "CREATE TEMP TABLE IF NOT EXISTS new_asks AS SELECT * FROM main.new_asks LIMIT 0",
)
"""In a file that cannot be written, the rows of `new_asks` are read where they are."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Values for the tables `spans` and `new_asks`, prepared before the transaction begins."""

    spans: list[tuple[Any, ...]]
    asks: list[tuple[Any, ...]]

    @classmethod
    def of(cls, rows: Sequence[SpanRow], now_ns: int) -> Self:
        spans = [
            (
                *(row.trace_id, row.span_id, row.rollout_id, row.start_ns, now_ns),
                *(row.asked, row.answered, checksum(row.otlp), row.otlp),
            )
            for row in rows
        ]
        return cls(spans, [(row.asked, row.start_ns, row.trace_id, row.span_id) for row in rows if row.asked])


def insert(db: Connection, batch: Batch) -> int:
    """Insert the spans that the store does not have yet; returns how many."""
    _insert_rows(db, _INSERT_ASKS, batch.asks)
    return _insert_rows(db, _INSERT, batch.spans)


def _insert_rows(db: Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> int:
    inserted = 0
    for first in range(0, len(rows), _ROWS_PER_STATEMENT):
        some = rows[first : first + _ROWS_PER_STATEMENT]
        sql = _with_placeholders(statement, len(some), len(some[0]))
        inserted += db.execute(sql, tuple(chain.from_iterable(some))).rowcount
    return inserted


@cache
def _with_placeholders(statement: str, rows: int, columns: int) -> str:
    row = f"({', '.join('?' * columns)})"
    return statement.format(", ".join([row] * rows))


def index_new_asks(db: Connection) -> bool:
    """Move some rows of `new_asks` into `asks`; returns whether more are left."""
    last, end = db.execute("SELECT min(rowid) + ?, max(rowid) FROM new_asks", (_ASKS_PER_STEP,)).fetchone()
    if end is None:
        return False
    db.execute(f"INSERT OR IGNORE INTO asks {NEW_ASKS} WHERE new.rowid <= ? ORDER BY new.response_id", (last,))
    db.execute("DELETE FROM new_asks WHERE rowid <= ?", (last,))
    return last < end


def query(db: Connection, rollout_ids: Sequence[str]) -> dict[str, list[bytes]] | None:
    """Spans of each rollout in order; None if the result depends on rows of `new_asks`."""
    found = {name: db.execute(QUERY, first_keys(name)).fetchall() for name in rollout_ids}
    needs_asks = any(row[-1] for rows in found.values() for row in rows)
    if needs_asks and db.execute("SELECT 1 FROM new_asks LIMIT 1").fetchone():
        return None
    return {name: verified(name, (row[:-1] for row in rows)) for name, rows in found.items()}


def query_read_only(db: Connection, rollout_ids: Sequence[str]) -> dict[str, list[bytes]]:
    """`query` in a file that cannot be written."""
    for statement in _SHADOWS:
        db.execute(statement)
    return query(db, rollout_ids) or {}
