"""The schema of a PostgreSQL store: a tuple of statements for each version.

Spans are in two tables. `spans` has the columns to find them by, about 100 bytes each, and its primary key keeps a span
once however often it is sent. `span_bodies` has the OTLP bytes, nearly all of the volume, in one partition for each day
of arrival, so that retention frees the disk by dropping tables. One partitioned table would not do: a unique key has to
contain the partition key, so a span that is sent again after midnight would be stored twice.
"""

from typing import Final

from agl.store.migration import Migrations

_FIRST = (
    "CREATE SEQUENCE batches",
    """CREATE TABLE spans (
        arrival bigint NOT NULL,
        start_ns bigint NOT NULL,
        arrived_ns bigint NOT NULL,
        day integer NOT NULL,
        size integer NOT NULL,
        trace_id bytea NOT NULL,
        span_id bytea NOT NULL,
        rollout_id text COLLATE "C",
        asked text COLLATE "C",
        answered text COLLATE "C",
        PRIMARY KEY (trace_id, span_id))""",
    "CREATE INDEX spans_by_arrival ON spans (day, arrival)",
    "CREATE INDEX spans_by_rollout ON spans (rollout_id) WHERE rollout_id IS NOT NULL",
    "CREATE INDEX spans_by_asked ON spans (asked, start_ns) WHERE asked IS NOT NULL",
    "CREATE INDEX spans_by_answered ON spans (answered) WHERE answered IS NOT NULL",
    """CREATE TABLE span_bodies (
        arrival bigint NOT NULL,
        day integer NOT NULL,
        otlp bytea NOT NULL,
        PRIMARY KEY (day, arrival))
        PARTITION BY RANGE (day)""",
    # Uncompressed: compression took longer than the write.
    "ALTER TABLE span_bodies ALTER COLUMN otlp SET STORAGE EXTERNAL",
    """CREATE TABLE rollouts (
        place bigint GENERATED ALWAYS AS IDENTITY,
        rollout_id text COLLATE "C" PRIMARY KEY,
        input text NOT NULL,
        group_id text COLLATE "C",
        mode text NOT NULL,
        max_attempts integer NOT NULL,
        retry_on text NOT NULL,
        timeout_s double precision,
        unresponsive_s double precision,
        metadata text NOT NULL,
        state text NOT NULL,
        attempts integer NOT NULL,
        ended_ns bigint)""",
    "CREATE INDEX rollouts_queued ON rollouts (place) WHERE state = 'queued'",
    "CREATE INDEX rollouts_by_state ON rollouts (state)",
    "CREATE INDEX rollouts_by_group ON rollouts (group_id, place) WHERE group_id IS NOT NULL",
    """CREATE TABLE attempts (
        attempt_id text COLLATE "C" PRIMARY KEY,
        rollout_id text COLLATE "C" NOT NULL,
        number integer NOT NULL,
        worker_id text NOT NULL,
        state text NOT NULL,
        started_ns bigint NOT NULL,
        heartbeat_ns bigint NOT NULL,
        ended_ns bigint,
        error text,
        UNIQUE (rollout_id, number))""",
    "CREATE INDEX attempts_running ON attempts (rollout_id) WHERE state = 'running'",
    """CREATE TABLE resources (
        name text COLLATE "C",
        version integer,
        uri text NOT NULL,
        metadata text NOT NULL,
        PRIMARY KEY (name, version))""",
    """CREATE TABLE leases (
        name text COLLATE "C",
        version integer,
        holder text COLLATE "C",
        expires_ns bigint NOT NULL,
        PRIMARY KEY (name, version, holder))""",
    """CREATE TABLE metrics (
        run text COLLATE "C",
        name text COLLATE "C",
        step bigint,
        value double precision NOT NULL,
        PRIMARY KEY (run, name, step))""",
)

# NULL for the spans of version 1. Not in `span_bodies`: a body that is missing is found too.
_CHECKSUMS = ("ALTER TABLE spans ADD COLUMN checksum bigint",)

# A response belongs to the request that arrived first.
_ASKED_BY_ARRIVAL = (
    "DROP INDEX spans_by_asked",
    "CREATE INDEX spans_by_asked ON spans (asked, arrival) WHERE asked IS NOT NULL",
)

# `agl.store.traffic` explains both. Bodies are uncompressed, as in `span_bodies`.
_TRAFFIC = (
    """CREATE TABLE pending (
        place bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        arrived_ns bigint NOT NULL,
        otlp bytea NOT NULL)""",
    "ALTER TABLE pending ALTER COLUMN otlp SET STORAGE EXTERNAL",
    """CREATE TABLE decisions (
        name text COLLATE "C" PRIMARY KEY,
        decision text NOT NULL,
        decided_ns bigint NOT NULL)""",
)

# NULL for the rows of earlier versions.
_ROW_CHECKSUMS = (
    "ALTER TABLE rollouts ADD COLUMN checksum bigint",
    "ALTER TABLE rollouts ADD COLUMN progress_checksum bigint",
    "ALTER TABLE attempts ADD COLUMN checksum bigint",
    "ALTER TABLE resources ADD COLUMN checksum bigint",
)

# `agl.store.files` explains them. Uncompressed, as in `span_bodies`.
_PARTS = (
    """CREATE TABLE resource_parts (
        name text COLLATE "C",
        version integer,
        digest text COLLATE "C",
        data bytea NOT NULL,
        PRIMARY KEY (name, version, digest))""",
    "ALTER TABLE resource_parts ALTER COLUMN data SET STORAGE EXTERNAL",
)

MIGRATIONS: Final[Migrations] = (_FIRST, _CHECKSUMS, (*_ASKED_BY_ARRIVAL, *_TRAFFIC, *_ROW_CHECKSUMS), _PARTS)
