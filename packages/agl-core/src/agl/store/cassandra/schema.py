"""The schema of a Cassandra store, one tuple of statements for each version, and who may bring it up to date.

spans        what spans are found by: the partition is their home, which is the rollout that they name, else their
             trace, and the bucket, another one whenever one has been filled
span_bodies  the same partitions with the OTLP bytes, nearly all of the volume; both are written in one mutation
responses    by response id, the spans that asked for an answer, and the gateway's calls that gave it
traces       the rollouts that name spans of a trace
latest       the home of the span that arrived last, and of the last that names a rollout
rollouts     a rollout in static columns, and its attempts in rows; changed where `revision` is as it was read
rollout_groups, queue, queue_slots, watched
             where to look for rollouts: by group, waiting, running with limits. What they say is checked: a row too
             many does no harm. It is written before what it tells of, so that there is none too few
resources    the versions of a name with their leases, changed where `revision` is as it was read
"""

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

# Rows that come and go: their tombstones may be forgotten soon, as a row that comes back does no harm.
_PASSING: Final = "WITH gc_grace_seconds = 3600"

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
    f"CREATE TABLE IF NOT EXISTS queue_slots (queue int, slot bigint, PRIMARY KEY (queue, slot)) {_PASSING}",
    f"""CREATE TABLE IF NOT EXISTS queue (
        slot bigint, place bigint, rollout_id text, number int,
        PRIMARY KEY (slot, place, rollout_id, number)) {_PASSING}""",
    f"""CREATE TABLE IF NOT EXISTS watched (
        shard int, rollout_id text, number int,
        PRIMARY KEY (shard, rollout_id, number)) {_PASSING}""",
    """CREATE TABLE IF NOT EXISTS resources (
        name text, version int, holder text,
        revision uuid static,
        uri text, metadata text, expires_ns bigint,
        PRIMARY KEY (name, version, holder))""",
    """CREATE TABLE IF NOT EXISTS metrics (
        run text, name text, step bigint, value double,
        PRIMARY KEY (run, name, step))""",
)

MIGRATIONS: Final = (_FIRST,)
"""Statements that lead from each version to the next; version 0 is a keyspace without our tables."""

_VERSION: Final = "CREATE TABLE IF NOT EXISTS {}.schema_version (place int PRIMARY KEY, version int, holder text)"
"""Its first row has the version, its second who brings the schema up to date."""

_LOCK_S: Final = 120
"""How long a migration may take; after that its lock ends by itself."""
_LOOK_EVERY_S: Final = 0.2
_MOST_COPIES: Final = 3


@dataclass(frozen=True, slots=True)
class _Lock:
    """A row that one process at a time can make."""

    take: str
    release: str


_OWN_LOCK: Final = _Lock(
    "INSERT INTO schema_version (place, holder) VALUES (%s, %s) IF NOT EXISTS USING TTL %s",
    "DELETE FROM schema_version WHERE place = %s IF holder = %s",
)
_TRACES_LOCK: Final = _Lock(
    "INSERT INTO system_traces.sessions (session_id, request) VALUES (%s, %s) IF NOT EXISTS USING TTL %s",
    "DELETE FROM system_traces.sessions WHERE session_id = %s IF request = %s",
)
"""For the table of our own lock. Of the tables that every Cassandra has, this is the one that takes rows."""


def migrate(cluster: Cluster, session: Session, address: Address) -> None:
    """Make the keyspace or bring it up to date, unless it is. Raises StoreError for one that is newer or not ours.

    One process at a time does: two that make the same table at once leave it broken.
    """
    metadata: Any = cluster.metadata
    if not _has_version(metadata, address):
        # A single node does one change after the other, and has too few copies of that table for a lock.
        key = uuid5(NAMESPACE_URL, f"cassandra:{address.keyspace}")
        with _locked(session, _TRACES_LOCK, key) if len(metadata.all_hosts()) > 1 else nullcontext():
            cluster.refresh_schema_metadata()  # Another may have made it meanwhile.
            if not _has_version(metadata, address):
                _make_version(session, metadata, address)
    session.set_keyspace(address.keyspace)
    if _version(session, address) == len(MIGRATIONS):
        return
    with _locked(session, _OWN_LOCK, 1):
        for statements in MIGRATIONS[_version(session, address) :]:
            for statement in statements:
                session.execute(statement, timeout=_LOCK_S, host=_first(metadata))
        session.execute("INSERT INTO schema_version (place, version) VALUES (0, %s)", (len(MIGRATIONS),))


def _has_version(metadata: Metadata, address: Address) -> bool:
    keyspace = (metadata.keyspaces or {}).get(address.keyspace)
    if keyspace is None or "schema_version" in keyspace.tables:
        return keyspace is not None
    if keyspace.tables:
        some = ", ".join(sorted(keyspace.tables)[:3])
        raise StoreError(f"the keyspace of {address.name} has tables of another program ({some}); name another")
    return False


def _make_version(session: Session, metadata: Metadata, address: Address) -> None:
    """Make the table that the lock is in, and the keyspace if it is not there."""
    node = _first(metadata)
    if address.keyspace not in (metadata.keyspaces or ()):
        nodes = sum(host.datacenter == node.datacenter for host in metadata.all_hosts())
        copies = address.replication_factor or min(_MOST_COPIES, nodes)
        session.execute(
            f"CREATE KEYSPACE IF NOT EXISTS {address.keyspace}"
            f" WITH replication = {{'class': 'NetworkTopologyStrategy', '{node.datacenter}': {copies}}}",
            host=node,
        )
    try:
        session.execute(_VERSION.format(address.keyspace), host=node)
    except (DriverException, NoHostAvailable):
        # Another made it at this moment: the node goes by the first, where its lock holds, and says so to the others.
        session.execute(f"SELECT version FROM {address.keyspace}.schema_version")


def _first(metadata: Metadata) -> Host:
    """The same node for all who change the schema: it does one change after the other."""
    hosts = metadata.all_hosts()
    return min([host for host in hosts if host.is_up] or hosts, key=lambda host: str(host.address))


def _version(session: Session, address: Address) -> int:
    row = session.execute("SELECT version FROM schema_version WHERE place = 0").one()
    version = row[0] if row else 0
    if version > len(MIGRATIONS):
        raise StoreError(
            f"{address.name} has schema version {version}, this program knows up to {len(MIGRATIONS)}; update agl-core"
        )
    return version


@contextmanager
def _locked(session: Session, lock: _Lock, key: Any) -> Iterator[None]:
    """Alone among all processes of the cluster, which a lock that is not ended leaves by itself after `_LOCK_S`."""
    holder, deadline = str(uuid4()), time.monotonic() + 2 * _LOCK_S
    while not _transact(session, lock.take, (key, holder, _LOCK_S), holder):
        if time.monotonic() > deadline:
            raise StoreError("another process has been making the tables of the store for minutes; look at it")
        time.sleep(_LOOK_EVERY_S)
    try:
        yield
    finally:
        while not _transact(session, lock.release, (key, holder), None) and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S)


def _transact(session: Session, text: str, values: tuple[Any, ...], holder: str | None) -> bool:
    """Whether it is done, by this try or by one before whose answer was lost."""
    # Of all datacenters: a lock is one for all of them.
    level, serial = ConsistencyLevel.QUORUM, ConsistencyLevel.SERIAL
    statement = SimpleStatement(text, consistency_level=level, serial_consistency_level=serial)
    try:
        result = session.execute(statement, values)
    except WriteTimeout:
        return False
    return result.was_applied or holder is None or any(holder in row for row in result)
