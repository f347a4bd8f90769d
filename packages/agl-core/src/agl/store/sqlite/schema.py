"""The schema of a SQLite store: a tuple of statements for each version."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

from agl.errors import OtlpError
from agl.store.migration import Migrations
from agl.store.span_row import SpanRow, checksum, row_of

_FIRST = (
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
)

_JOIN_BY_ANSWER = (
    "ALTER TABLE spans ADD COLUMN asked TEXT",
    "ALTER TABLE spans ADD COLUMN answered TEXT",
    "CREATE INDEX spans_by_asked ON spans (asked, start_ns) WHERE asked IS NOT NULL",
    "CREATE INDEX spans_by_answered ON spans (answered) WHERE answered IS NOT NULL",
)

# `rollout_id` is NULL for a span that names no rollout (it was the trace id before), which needs no index entry. `otlp`
# is the last column: SQLite reads past a long value to get at the columns after it. `spans.py` explains `asks`.
_LEAN_SPANS = (
    "ALTER TABLE spans RENAME TO old_spans",
    """CREATE TABLE spans (
        arrival INTEGER PRIMARY KEY,
        trace_id BLOB NOT NULL,
        span_id BLOB NOT NULL,
        rollout_id TEXT,
        start_ns INTEGER NOT NULL,
        arrived_ns INTEGER NOT NULL,
        asked TEXT,
        answered TEXT,
        otlp BLOB NOT NULL)""",
    """INSERT INTO spans
       SELECT arrival, trace_id, span_id, nullif(rollout_id, lower(hex(trace_id))), start_ns, start_ns, asked, answered,
              otlp
       FROM old_spans ORDER BY arrival""",
    "DROP TABLE old_spans",
    "CREATE UNIQUE INDEX spans_by_id ON spans (trace_id, span_id)",
    "CREATE INDEX spans_by_rollout ON spans (rollout_id) WHERE rollout_id IS NOT NULL",
    "CREATE INDEX spans_by_answered ON spans (answered) WHERE answered IS NOT NULL",
    """CREATE TABLE new_asks (
        response_id TEXT NOT NULL,
        start_ns INTEGER NOT NULL,
        trace_id BLOB NOT NULL,
        span_id BLOB NOT NULL)""",
    """CREATE TABLE asks (
        response_id TEXT NOT NULL,
        start_ns INTEGER NOT NULL,
        trace_id BLOB NOT NULL,
        span_id BLOB NOT NULL,
        PRIMARY KEY (response_id, start_ns, trace_id, span_id)) WITHOUT ROWID""",
    "INSERT INTO new_asks SELECT asked, start_ns, trace_id, span_id FROM spans WHERE asked IS NOT NULL",
)

_LIMITS_AND_LEASES = (
    "ALTER TABLE rollouts ADD COLUMN retry_on TEXT NOT NULL DEFAULT 'failed timeout unresponsive'",
    "ALTER TABLE rollouts ADD COLUMN timeout_s REAL",
    "ALTER TABLE rollouts ADD COLUMN unresponsive_s REAL",
    "ALTER TABLE rollouts ADD COLUMN attempts INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE rollouts ADD COLUMN ended_ns INTEGER",
    "UPDATE rollouts SET attempts = (SELECT count(*) FROM attempts WHERE attempts.rollout_id = rollouts.rollout_id)",
    """UPDATE rollouts
       SET ended_ns = coalesce((SELECT max(ended_ns) FROM attempts WHERE attempts.rollout_id = rollouts.rollout_id), 0)
       WHERE state IN ('succeeded', 'failed', 'cancelled')""",
    "UPDATE attempts SET state = 'cancelled' WHERE state = 'running' AND rollout_id IN"
    " (SELECT rollout_id FROM rollouts WHERE state = 'cancelled')",
    """CREATE TABLE leases (
        name TEXT NOT NULL,
        version INTEGER NOT NULL,
        holder TEXT NOT NULL,
        expires_ns INTEGER NOT NULL,
        PRIMARY KEY (name, version, holder)) WITHOUT ROWID""",
)

# Reads the ids again from the spans: version 2 added their columns without values for the spans of version 1.
# `checksum` is NULL for a span from a program of version 3 that still has the file open: it stores spans as before.
_CHECKSUMS = (
    "ALTER TABLE spans RENAME TO old_spans",
    """CREATE TABLE spans (
        arrival INTEGER PRIMARY KEY,
        trace_id BLOB NOT NULL,
        span_id BLOB NOT NULL,
        rollout_id TEXT,
        start_ns INTEGER NOT NULL,
        arrived_ns INTEGER NOT NULL,
        asked TEXT,
        answered TEXT,
        checksum INTEGER,
        otlp BLOB NOT NULL)""",
    """INSERT INTO spans
       SELECT arrival, trace_id, span_id, coalesce(agl_rollout_id(otlp), rollout_id), start_ns, arrived_ns,
              agl_asked(otlp), agl_answered(otlp), agl_checksum(otlp), otlp
       FROM old_spans ORDER BY arrival""",
    "DROP TABLE old_spans",
    "CREATE UNIQUE INDEX spans_by_id ON spans (trace_id, span_id)",
    "CREATE INDEX spans_by_rollout ON spans (rollout_id) WHERE rollout_id IS NOT NULL",
    "CREATE INDEX spans_by_answered ON spans (answered) WHERE answered IS NOT NULL",
    "DELETE FROM asks",
    "DELETE FROM new_asks",
    "INSERT INTO new_asks SELECT asked, start_ns, trace_id, span_id FROM spans WHERE asked IS NOT NULL",
)

# `Clock.offset_ns` of the machine's current run: all processes that have the file open share one clock.
_CLOCK = ("CREATE TABLE clock (boot_id TEXT PRIMARY KEY, offset_ns INTEGER NOT NULL) WITHOUT ROWID",)

# A response belongs to the request that arrived first. `new_asks` stays as it is, for programs of version 4.
_ASKS_BY_ARRIVAL = (
    "DROP TABLE asks",
    """CREATE TABLE asks (
        response_id TEXT NOT NULL,
        arrival INTEGER NOT NULL,
        PRIMARY KEY (response_id, arrival)) WITHOUT ROWID""",
    "INSERT INTO asks SELECT asked, arrival FROM spans WHERE asked IS NOT NULL ORDER BY asked",
    "DELETE FROM new_asks",
)

# `agl.store.traffic` explains both. No index of `pending`: most of its rows are soon deleted. The place of a deleted
# row is not given again: a sampler would take the span there for the one before.
_TRAFFIC = (
    """CREATE TABLE pending (
        place INTEGER PRIMARY KEY AUTOINCREMENT,
        arrived_ns INTEGER NOT NULL,
        otlp BLOB NOT NULL)""",
    """CREATE TABLE decisions (
        name TEXT PRIMARY KEY,
        decision TEXT NOT NULL,
        decided_ns INTEGER NOT NULL) WITHOUT ROWID""",
)

# NULL for the rows of earlier versions.
_ROW_CHECKSUMS = (
    "ALTER TABLE rollouts ADD COLUMN checksum INTEGER",
    "ALTER TABLE rollouts ADD COLUMN progress_checksum INTEGER",
    "ALTER TABLE attempts ADD COLUMN checksum INTEGER",
    "ALTER TABLE resources ADD COLUMN checksum INTEGER",
)

# `agl.store.files` explains them. With a row id: a table of long rows without one would be slow.
_PARTS = (
    """CREATE TABLE resource_parts (
        name TEXT NOT NULL,
        version INTEGER NOT NULL,
        digest TEXT NOT NULL,
        data BLOB NOT NULL,
        PRIMARY KEY (name, version, digest))""",
)

MIGRATIONS: Final[Migrations] = (
    _FIRST,
    _JOIN_BY_ANSWER,
    (*_LEAN_SPANS, *_LIMITS_AND_LEASES),
    (*_CHECKSUMS, *_CLOCK),
    (*_ASKS_BY_ARRIVAL, *_TRAFFIC, *_ROW_CHECKSUMS),
    _PARTS,
)


@lru_cache(maxsize=1)
def _row(otlp: bytes) -> SpanRow | None:
    try:
        return row_of(otlp)
    except OtlpError:  # A damaged span: `check` reports it.
        return None


FUNCTIONS: Final[Mapping[str, Callable[[bytes], Any]]] = {
    "agl_rollout_id": lambda otlp: (row := _row(otlp)) and row.rollout_id,
    "agl_asked": lambda otlp: (row := _row(otlp)) and row.asked,
    "agl_answered": lambda otlp: (row := _row(otlp)) and row.answered,
    "agl_checksum": checksum,
}
"""SQL functions of the migrations."""
