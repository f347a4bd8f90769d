"""Stores of every past schema: their rollouts are the same after migration as in a new store."""

import sqlite3
from contextlib import closing

import psycopg
from cassandra.cluster import Cluster

from agl.store import open_store, sqlite_path
from agl.store.cassandra.address import Address
from agl.trajectory import build_trajectory
from tests.store.backends import NewUri
from tests.store.cassandra_server import PROTOCOL
from tests.store.old_stores import PAST, ROLLOUTS, SPANS, statements


def make(name: str, uri: str) -> str:
    """Make the old store `name` at `uri`, which is new; returns its URI."""
    if path := sqlite_path(uri):
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.executescript(";\n".join(statements(name)))
    elif uri.startswith("postgresql"):
        with psycopg.connect(uri) as connection:
            for statement in statements(name):
                connection.execute(statement.encode())
    else:
        uri = uri.replace("/reused?", f"/old_{name.replace('-', '_')}?")
        address = Address.of(uri)
        with Cluster(address.hosts, port=address.port, protocol_version=PROTOCOL) as cluster:
            session = cluster.connect()
            replication = "{'class': 'SimpleStrategy', 'replication_factor': 1}"
            session.execute(f"CREATE KEYSPACE {address.keyspace} WITH replication = {replication}")
            session.set_keyspace(address.keyspace)
            for statement in statements(name):
                session.execute(statement, timeout=60)
    return uri


def test_rollouts_of_an_old_store_are_those_of_a_new_one(new_uri: NewUri, old: str) -> None:
    names = [name for name in PAST if name.startswith(f"{old}-")]
    with closing(open_store("memory://")) as new:
        new.append_spans(SPANS)
        expected = [build_trajectory(new.query_spans(rollout_id)) for rollout_id in ROLLOUTS]
    assert [len(each.rows) for each in expected] == [1, 1]
    for name in names:
        with closing(open_store(make(name, new_uri()))) as store:
            assert [build_trajectory(store.query_spans(rollout_id)) for rollout_id in ROLLOUTS] == expected, name
            assert store.append_spans(SPANS) == 0
            leased = store.lease_rollout("worker")
            assert leased is not None and (leased[0].input, leased[0].max_attempts) == ({"n": 1}, 2)
