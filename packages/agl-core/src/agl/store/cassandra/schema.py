"""The schema of a Cassandra store: a tuple of statements for each version, and its migration.

spans        the columns to find spans by; `span_partition` explains the partition key
span_bodies  the OTLP bytes, nearly all of the volume, in the same partitions; one mutation writes both
responses    by response id: the spans that requested it, and the gateway calls that returned it
traces       by trace: the rollouts that its spans name
latest       `home` of the span that arrived last, in the row that is not `named`
rollouts     a rollout in static columns and its attempts in rows, changed by compare-and-set on `revision`
rollout_groups, queue, queue_slots, watched
             indexes of rollouts: by group, queued, running with limits. A reader checks the rollout itself, so an entry
             too many does no harm; an entry is written before the change that it is for, so that none is missing
pending, pending_minutes
             spans that are not decided yet (`agl.store.traffic`), and the minutes of arrival that have some
decisions    the decision on each name, inserted by compare-and-set
resources    the versions of a name with their leases, changed by compare-and-set on `revision`
resource_parts
             the files of a version, in parts (`agl.store.files`)
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final
from uuid import NAMESPACE_URL, uuid4, uuid5

from cassandra import ConsistencyLevel, DriverException, WriteTimeout
from cassandra.cluster import Cluster, NoHostAvailable, Session
from cassandra.metadata import Metadata
from cassandra.pool import Host
from cassandra.query import SimpleStatement

from agl.errors import StoreError
from agl.store.cassandra.address import Address
from agl.store.migration import Migrations, pending_statements

# Tables of short-lived rows. Tombstones expire soon, because a deleted row that reappears does no harm.
_SHORT_LIVED: Final = "WITH gc_grace_seconds = 3600"

_FIRST = (
    """CREATE TABLE IF NOT EXISTS spans (
        home text, bucket int, span blob,
        closed boolean static,
        start_ns bigint, arrived_ns bigint, size int, response_id text, is_answer boolean,
        PRIMARY KEY ((home, bucket), span))""",
    """CREATE TABLE IF NOT EXISTS span_bodies (
        home text, bucket int, span blob,
        otlp blob,
        PRIMARY KEY ((home, bucket), span))""",
    """CREATE TABLE IF NOT EXISTS responses (
        response_id text, is_answer boolean, start_ns bigint, span blob,
        home text,
        PRIMARY KEY (response_id, is_answer, start_ns, span))""",
    "CREATE TABLE IF NOT EXISTS traces (trace_id blob, home text, PRIMARY KEY (trace_id, home))",
    "CREATE TABLE IF NOT EXISTS latest (place int, named boolean, home text, PRIMARY KEY (place, named))",
    """CREATE TABLE IF NOT EXISTS rollouts (
        rollout_id text, number int,
        revision uuid static, place bigint static,
        input text static, group_id text static, mode text static, max_attempts int static, retry_on text static,
        timeout_s double static, unresponsive_s double static, metadata text static,
        state text static, attempts int static, ended_ns bigint static,
        worker_id text, attempt_state text, started_ns bigint, heartbeat_ns bigint, attempt_ended_ns bigint, error text,
        PRIMARY KEY (rollout_id, number))""",
    """CREATE TABLE IF NOT EXISTS rollout_groups (
        group_id text, place bigint, rollout_id text,
        PRIMARY KEY (group_id, place, rollout_id))""",
    f"CREATE TABLE IF NOT EXISTS queue_slots (queue int, slot bigint, PRIMARY KEY (queue, slot)) {_SHORT_LIVED}",
    f"""CREATE TABLE IF NOT EXISTS queue (
        slot bigint, place bigint, rollout_id text, number int,
        PRIMARY KEY (slot, place, rollout_id, number)) {_SHORT_LIVED}""",
    f"""CREATE TABLE IF NOT EXISTS watched (
        shard int, rollout_id text, number int,
        PRIMARY KEY (shard, rollout_id, number)) {_SHORT_LIVED}""",
    """CREATE TABLE IF NOT EXISTS resources (
        name text, version int, holder text,
        revision uuid static,
        uri text, metadata text, expires_ns bigint,
        PRIMARY KEY (name, version, holder))""",
    """CREATE TABLE IF NOT EXISTS metrics (
        run text, name text, step bigint, value double,
        PRIMARY KEY (run, name, step))""",
)

_CHECKSUMS = ("ALTER TABLE span_bodies ADD checksum bigint",)

# NULL for the requests of earlier versions.
_ARRIVALS = ("ALTER TABLE responses ADD arrived_ns bigint",)

_TRAFFIC = (
    f"""CREATE TABLE IF NOT EXISTS pending (
        minute bigint, shard int, span blob,
        arrived_ns bigint, otlp blob,
        PRIMARY KEY ((minute, shard), span)) {_SHORT_LIVED}""",
    f"""CREATE TABLE IF NOT EXISTS pending_minutes (
        place int, minute bigint,
        PRIMARY KEY (place, minute)) {_SHORT_LIVED}""",
    "CREATE TABLE IF NOT EXISTS decisions (name text PRIMARY KEY, decision text, decided_ns bigint)",
)

# None for the rows of earlier versions.
_ROW_CHECKSUMS = (
    "ALTER TABLE rollouts ADD checksum bigint static",
    "ALTER TABLE rollouts ADD progress_checksum bigint static",
    "ALTER TABLE rollouts ADD attempt_checksum bigint",
    "ALTER TABLE resources ADD checksum bigint",
)

_PARTS = (
    """CREATE TABLE IF NOT EXISTS resource_parts (
        name text, version int, digest text,
        data blob,
        PRIMARY KEY ((name, version), digest))""",
)

MIGRATIONS: Final[Migrations] = (_FIRST, _CHECKSUMS, (*_ARRIVALS, *_TRAFFIC, *_ROW_CHECKSUMS), _PARTS)

_ADD: Final = re.compile(r"ALTER TABLE (\w+) ADD (\w+)")

_VERSION: Final = "CREATE TABLE IF NOT EXISTS {}.schema_version (place int PRIMARY KEY, version int, holder text)"
"""Row 0 has the version, row 1 is the lock of the process that migrates."""

_LOCK_S: Final = 120
"""Limit for a migration, after which its lock expires."""
_RETRY_S: Final = 0.2
_MAX_COPIES: Final = 3


@dataclass(frozen=True, slots=True)
class _Lock:
    """A row that only one process at a time can insert."""

    acquire: str
    release: str


_OWN_LOCK: Final = _Lock(
    "INSERT INTO schema_version (place, holder) VALUES (%s, %s) IF NOT EXISTS USING TTL %s",
    "DELETE FROM schema_version WHERE place = %s IF holder = %s",
)
_TRACES_LOCK: Final = _Lock(
    "INSERT INTO system_traces.sessions (session_id, request) VALUES (%s, %s) IF NOT EXISTS USING TTL %s",
    "DELETE FROM system_traces.sessions WHERE session_id = %s IF request = %s",
)
"""Lock for creating the table of `_OWN_LOCK`: the one system table of every Cassandra that clients can write."""


def migrate(cluster: Cluster, session: Session, address: Address) -> None:
    """Create or migrate the keyspace. Raises StoreError if it is newer, or another program owns it.

    One process at a time: two that create the same table at the same time leave it broken.
    """
    metadata: Any = cluster.metadata
    if not _has_version(metadata, address):
        # A single node serialises schema changes, and its system_traces has too few copies for a lock.
        key = uuid5(NAMESPACE_URL, f"cassandra:{address.keyspace}")
        with _locked(session, _TRACES_LOCK, key) if len(metadata.all_hosts()) > 1 else nullcontext():
            cluster.refresh_schema_metadata()  # Another process may have created it meanwhile.
            if not _has_version(metadata, address):
                _create_version_table(session, metadata, address)
    session.set_keyspace(address.keyspace)
    if not _pending_statements(session, address):
        return
    with _locked(session, _OWN_LOCK, 1):
        for statement in _pending_statements(session, address):
            if not _is_done(cluster, address, statement):
                session.execute(statement, timeout=_LOCK_S, host=_first(metadata))
        session.execute("INSERT INTO schema_version (place, version) VALUES (0, %s)", (len(MIGRATIONS),))


def _is_done(cluster: Cluster, address: Address, statement: str) -> bool:
    """Whether a process that ended before it recorded the version has added the column."""
    if (added := _ADD.match(statement)) is None:
        return False
    cluster.refresh_schema_metadata()
    metadata: Any = cluster.metadata
    return added[2] in metadata.keyspaces[address.keyspace].tables[added[1]].columns


def _has_version(metadata: Metadata, address: Address) -> bool:
    keyspace = (metadata.keyspaces or {}).get(address.keyspace)
    if keyspace is None or "schema_version" in keyspace.tables:
        return keyspace is not None
    if keyspace.tables:
        some = ", ".join(sorted(keyspace.tables)[:3])
        raise StoreError(f"the keyspace of {address.name} has tables of another program ({some}); name another")
    return False


def _create_version_table(session: Session, metadata: Metadata, address: Address) -> None:
    """Create the table of `_OWN_LOCK`, and the keyspace if it does not exist."""
    node = _first(metadata)
    if address.keyspace not in (metadata.keyspaces or ()):
        nodes = sum(host.datacenter == node.datacenter for host in metadata.all_hosts())
        copies = address.replication_factor or min(_MAX_COPIES, nodes)
        session.execute(
            f"CREATE KEYSPACE IF NOT EXISTS {address.keyspace}"
            f" WITH replication = {{'class': 'NetworkTopologyStrategy', '{node.datacenter}': {copies}}}",
            host=node,
        )
    try:
        session.execute(_VERSION.format(address.keyspace), host=node)
    except (DriverException, NoHostAvailable):
        # Another process created it at the same moment; this query fails if it did not.
        session.execute(f"SELECT version FROM {address.keyspace}.schema_version")


def _first(metadata: Metadata) -> Host:
    """The node for all schema changes, the same in every process: it serialises them."""
    hosts = metadata.all_hosts()
    return min([host for host in hosts if host.is_up] or hosts, key=lambda host: str(host.address))


def _pending_statements(session: Session, address: Address) -> list[str]:
    row = session.execute("SELECT version FROM schema_version WHERE place = 0").one()
    return pending_statements(address.name, row[0] if row else 0, MIGRATIONS)


@contextmanager
def _locked(session: Session, lock: _Lock, key: Any) -> Iterator[None]:
    """Hold `lock`, which all processes of the cluster share. It expires after `_LOCK_S` if it is not released."""
    holder, deadline = str(uuid4()), time.monotonic() + 2 * _LOCK_S
    while not _transact(session, lock.acquire, (key, holder, _LOCK_S), holder):
        if time.monotonic() > deadline:
            raise StoreError(f"another process has been creating the tables of the store for {2 * _LOCK_S} s; end it")
        time.sleep(_RETRY_S)
    try:
        yield
    finally:
        while not _transact(session, lock.release, (key, holder), None) and time.monotonic() < deadline:
            time.sleep(_RETRY_S)


def _transact(session: Session, text: str, values: tuple[Any, ...], holder: str | None) -> bool:
    """Whether this try succeeded, or an earlier one whose response was lost."""
    # Not LOCAL: the lock is one for all datacenters.
    level, serial = ConsistencyLevel.QUORUM, ConsistencyLevel.SERIAL
    statement = SimpleStatement(text, consistency_level=level, serial_consistency_level=serial)
    try:
        result = session.execute(statement, values)
    except WriteTimeout:
        return False
    return result.was_applied or holder is None or any(holder in row for row in result)
