"""Spans in PostgreSQL: what finds them in `spans`, their bytes in a partition of `span_bodies` for the day."""

from collections.abc import Iterable, Sequence
from typing import Any, Final

from psycopg.errors import CheckViolation

from agl.store.postgres.database import LOCK, Connection
from agl.store.span_row import SpanRow

DAY_NS: Final = 86_400 * 10**9

_COPY = """
COPY incoming (place, trace_id, span_id, rollout_id, start_ns, asked, answered, otlp) FROM STDIN (FORMAT BINARY)
"""
_COPY_TYPES = ("int4", "bytea", "bytea", "text", "int8", "text", "text", "bytea")

# Arrivals count batches in steps that leave room for the spans of each. Inserted in the order of the key: two that
# insert the same spans wait for each other in one direction only.
_INSERT = """
WITH batch AS MATERIALIZED (
    SELECT nextval('batches') * 16777216 AS arrival
), fresh AS (
    INSERT INTO spans (arrival, start_ns, arrived_ns, day, size, trace_id, span_id, rollout_id, asked, answered)
    SELECT arrival + place, start_ns, %(now_ns)s, %(day)s, octet_length(otlp), trace_id, span_id, rollout_id, asked,
           answered
    FROM incoming CROSS JOIN batch ORDER BY trace_id, span_id
    ON CONFLICT (trace_id, span_id) DO NOTHING
    RETURNING arrival
)
INSERT INTO span_bodies (arrival, day, otlp)
SELECT fresh.arrival, %(day)s, otlp
FROM incoming CROSS JOIN batch JOIN fresh ON fresh.arrival = batch.arrival + place
"""

_OF_KEY = """
LATERAL (
    SELECT own.* FROM spans own WHERE own.rollout_id = whole.rollout
    UNION ALL
    SELECT own.* FROM spans own WHERE own.trace_id = whole.trace AND own.rollout_id IS NULL
) span
"""

WHOLE: Final = f"""
WITH RECURSIVE whole (rollout, trace) AS (
    (SELECT %(rollout)s::text, NULL::bytea UNION ALL SELECT NULL, %(trace)s::bytea)
    UNION
    SELECT NULL, next.trace_id FROM whole CROSS JOIN {_OF_KEY} CROSS JOIN LATERAL (
        SELECT span.trace_id
        UNION ALL
        SELECT answer.trace_id FROM spans answer
        WHERE answer.answered = span.asked AND answer.rollout_id IS NULL
          AND span.start_ns = (SELECT min(start_ns) FROM spans WHERE asked = span.asked)
        UNION ALL
        SELECT request.trace_id FROM spans request
        WHERE request.asked = span.answered AND request.rollout_id IS NULL
          AND request.start_ns = (SELECT min(start_ns) FROM spans WHERE asked = span.answered)
    ) next
)
"""
"""What makes up a rollout: its id, and the traces whose spans that name no rollout belong to it."""

# A subquery for each body, not a join: the planner, which cannot know how few they are, would walk all bodies for it.
_QUERY = f"""
{WHOLE}
SELECT (SELECT otlp FROM span_bodies body WHERE body.day = span.day AND body.arrival = span.arrival)
FROM whole CROSS JOIN {_OF_KEY} ORDER BY span.start_ns, span.arrival
"""

_IDS = """
SELECT id FROM (
    SELECT rollout_id AS id, min(arrival) AS first FROM spans WHERE rollout_id IS NOT NULL GROUP BY rollout_id
    UNION ALL
    SELECT encode(trace_id, 'hex'), min(arrival) FROM spans GROUP BY trace_id HAVING max(rollout_id) IS NULL
) found ORDER BY first
"""

_LAST = """
SELECT coalesce(
    (SELECT rollout_id FROM spans WHERE rollout_id IS NOT NULL ORDER BY day DESC, arrival DESC LIMIT 1),
    (SELECT encode(trace_id, 'hex') FROM spans ORDER BY day DESC, arrival DESC LIMIT 1))
"""


class MissingPartition(Exception):
    """The spans arrive on a day that has no partition yet: `make_partition`."""


def once(rows: Iterable[SpanRow]) -> list[SpanRow]:
    """The first of each span, in order."""
    found: dict[tuple[bytes, bytes], SpanRow] = {}
    for row in rows:
        found.setdefault((row.trace_id, row.span_id), row)
    return list(found.values())


def insert(db: Connection, rows: Sequence[SpanRow], now_ns: int) -> int:
    """Keep `rows`, each span at most once among them; returns how many were new.

    Raises MissingPartition where there is none for the day.
    """
    with db.cursor() as cursor:
        with cursor.copy(_COPY) as copy:
            copy.set_types(_COPY_TYPES)
            for place, row in enumerate(rows):
                copy.write_row(_values(place, row))
        try:
            cursor.execute(_INSERT, {"now_ns": now_ns, "day": now_ns // DAY_NS})
        except CheckViolation as error:  # The tables have no other check.
            raise MissingPartition from error
        return cursor.rowcount


def make_partition(db: Connection, day: int) -> None:
    db.execute("SELECT pg_advisory_xact_lock(%s, 1)", (LOCK,))
    # Bodies stay in their rows up to what a page can hold: the side table for longer ones costs two more writes each.
    db.execute(
        f"CREATE TABLE IF NOT EXISTS {partition(day)} PARTITION OF span_bodies FOR VALUES FROM ({day}) TO ({day + 1})"
        " WITH (toast_tuple_target = 8160)".encode()
    )


def partition(day: int) -> str:
    """Name of the table for the bodies that arrived on a day since 1970."""
    return f"span_bodies_{day}"


def query(db: Connection, rollout_id: str) -> list[bytes]:
    return [body for (body,) in db.execute(_QUERY, keys(rollout_id))]


def last_rollout_id(db: Connection) -> str | None:
    found = db.execute(_LAST).fetchone()
    return found[0] if found else None


def rollout_ids(db: Connection) -> list[str]:
    return [name for (name,) in db.execute(_IDS)]


def count(db: Connection) -> int:
    found = db.execute("SELECT count(*) FROM spans").fetchone()
    return found[0] if found else 0


def keys(rollout_id: str) -> dict[str, Any]:
    """Parameters of `WHOLE`: a rollout that no span names has the id of its trace."""
    return {"rollout": rollout_id, "trace": _trace(rollout_id)}


def attempt_ids(rows: Iterable[SpanRow]) -> list[str]:
    """Attempts that the rows name."""
    return sorted({row.attempt_id for row in rows if row.attempt_id})


def _values(place: int, row: SpanRow) -> tuple[Any, ...]:
    return place, row.trace_id, row.span_id, row.rollout_id, row.start_ns, row.asked, row.answered, row.otlp


def _trace(rollout_id: str) -> bytes | None:
    try:
        return bytes.fromhex(rollout_id) if len(rollout_id) == 32 else None
    except ValueError:
        return None
