"""Spans in PostgreSQL: `spans` has the columns to find them by, `span_bodies` their OTLP bytes in daily partitions."""

from collections.abc import Iterable, Sequence
from typing import Any, Final

from psycopg.errors import CheckViolation

from agl.store.membership import trace_id_of
from agl.store.postgres.database import LOCK, PostgresConnection
from agl.store.span_row import SpanRow, Stored, checksum, verified

DAY_NS: Final = 86_400 * 10**9

_COPY = """
COPY incoming (place, trace_id, span_id, rollout_id, start_ns, asked, answered, checksum, otlp)
FROM STDIN (FORMAT BINARY)
"""
_COPY_TYPES = ("int4", "bytea", "bytea", "text", "int8", "text", "text", "int8", "bytea")

# `arrival` is the number of the batch times 2**24, plus the place in the batch. Sorted by the unique key: transactions
# that insert the same spans then wait for each other in one direction, which cannot deadlock.
_INSERT = """
WITH batch AS MATERIALIZED (
    SELECT nextval('batches') * 16777216 AS arrival
), fresh AS (
    INSERT INTO spans
        (arrival, start_ns, arrived_ns, day, size, trace_id, span_id, rollout_id, asked, answered, checksum)
    SELECT arrival + place, start_ns, :now_ns, :day, octet_length(otlp), trace_id, span_id, rollout_id, asked, answered,
        checksum
    FROM incoming CROSS JOIN batch ORDER BY trace_id, span_id
    ON CONFLICT (trace_id, span_id) DO NOTHING
    RETURNING arrival
)
INSERT INTO span_bodies (arrival, day, otlp)
SELECT fresh.arrival, :day, otlp
FROM incoming CROSS JOIN batch JOIN fresh ON fresh.arrival = batch.arrival + place
"""

_SPANS_OF_MEMBER = """
LATERAL (
    SELECT own.* FROM spans own WHERE own.rollout_id = member.rollout
    UNION ALL
    SELECT own.* FROM spans own WHERE own.trace_id = member.trace AND own.rollout_id IS NULL
) span
"""

_MEMBERS: Final = f"""
member (number, rollout, trace) AS (
    (SELECT number, rollout, NULL FROM first UNION ALL SELECT number, NULL, trace FROM first WHERE trace IS NOT NULL)
    UNION
    SELECT member.number, NULL, next.trace_id FROM member CROSS JOIN {_SPANS_OF_MEMBER} CROSS JOIN LATERAL (
        SELECT span.trace_id
        UNION ALL
        SELECT answer.trace_id FROM spans answer
        WHERE answer.answered = span.asked AND answer.rollout_id IS NULL
          AND span.arrival = (SELECT min(arrival) FROM spans WHERE asked = span.asked)
        UNION ALL
        SELECT request.trace_id FROM spans request
        WHERE request.asked = span.answered AND request.rollout_id IS NULL
          AND request.arrival = (SELECT min(arrival) FROM spans WHERE asked = span.answered)
    ) next
)
"""
"""The keys of each rollout of `first` by the rule of `agl.store.membership`."""

MEMBERS: Final = (
    f"WITH RECURSIVE first AS (SELECT 1 AS number, :rollout::text AS rollout, :trace::bytea AS trace), {_MEMBERS}"
)
"""The keys of one rollout; parameters are `first_keys`."""

# A subquery for each body: for a join the planner, which cannot know how few spans there are, would scan all bodies.
# Bodies are read after sorting (OFFSET 0 keeps the planner from merging the two): with them, a sort of more than a few
# thousand spans writes files, which a full disk refuses.
QUERY: Final = f"""
WITH RECURSIVE first (rollout, trace, number) AS (
    SELECT * FROM unnest(:rollouts::text[], :traces::bytea[]) WITH ORDINALITY
), {_MEMBERS}
SELECT number, (SELECT otlp FROM span_bodies body WHERE body.day = span.day AND body.arrival = span.arrival),
    checksum, trace_id, span_id, start_ns
FROM (
    SELECT member.number, span.day, span.arrival, span.checksum, span.trace_id, span.span_id, span.start_ns
    FROM member CROSS JOIN {_SPANS_OF_MEMBER} ORDER BY span.start_ns, span.arrival OFFSET 0
) span
"""

LAST_SPAN: Final = "SELECT rollout_id, trace_id FROM spans ORDER BY day DESC, arrival DESC LIMIT 1"


class MissingPartition(Exception):
    """The day of arrival has no partition yet: call `make_partition`."""


def without_duplicates(rows: Iterable[SpanRow]) -> list[SpanRow]:
    """The first row of each span, in order."""
    found: dict[tuple[bytes, bytes], SpanRow] = {}
    for row in rows:
        found.setdefault((row.trace_id, row.span_id), row)
    return list(found.values())


def insert(db: PostgresConnection, rows: Sequence[SpanRow], now_ns: int) -> int:
    """Insert those of `rows` (no duplicates) that are new; returns how many. Raises MissingPartition for a new day."""
    with db.cursor() as cursor, cursor.copy(_COPY) as copy:
        copy.set_types(_COPY_TYPES)
        for place, row in enumerate(rows):
            copy.write_row(_values(place, row))
    try:
        return db.execute(_INSERT, {"now_ns": now_ns, "day": now_ns // DAY_NS}).rowcount
    except CheckViolation as error:  # A missing partition is the only check of these tables.
        raise MissingPartition from error


def make_partition(db: PostgresConnection, day: int) -> None:
    db.execute("SELECT pg_advisory_xact_lock(?, 1)", (LOCK,))
    # Rows keep a body of up to a page: the TOAST table for longer ones costs two more writes for each.
    db.execute(
        f"CREATE TABLE IF NOT EXISTS {partition(day)} PARTITION OF span_bodies FOR VALUES FROM ({day}) TO ({day + 1})"
        " WITH (toast_tuple_target = 8160)"
    )


def partition(day: int) -> str:
    """Table of the bodies that arrived on `day`, in days since 1970-01-01."""
    return f"span_bodies_{day}"


def query(db: PostgresConnection, rollout_ids: Sequence[str]) -> dict[str, list[bytes]]:
    """Spans of each rollout in order."""
    names = list(dict.fromkeys(rollout_ids))
    found: dict[str, list[Stored]] = {name: [] for name in names}
    # By number, not by name: the server may keep a name in a different form.
    for number, *stored in db.execute(QUERY, {"rollouts": names, "traces": [*map(trace_id_of, names)]}):
        found[names[number - 1]].append(tuple(stored))
    return {name: verified(name, rows) for name, rows in found.items()}


def _values(place: int, row: SpanRow) -> tuple[Any, ...]:
    columns = (row.trace_id, row.span_id, row.rollout_id, row.start_ns, row.asked, row.answered)
    return place, *columns, checksum(row.otlp), row.otlp
