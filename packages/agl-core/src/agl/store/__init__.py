"""Stores: one protocol, one class for each backend, opened by URI."""

from agl.errors import StoreError
from agl.store.protocol import Collected, Resource, Store
from agl.store.rollout import Attempt, Rollout
from agl.store.states import AttemptState, RolloutState

__all__ = [
    "Attempt",
    "AttemptState",
    "Collected",
    "Resource",
    "Rollout",
    "RolloutState",
    "Store",
    "open_store",
]


def open_store(uri: str) -> Store:
    """Open the store at `uri` (`sqlite:///path.db`, `postgresql://`, `cassandra://`, `memory://`), made if it is not
    there, or that which `agl serve` serves at `http://HOST:PORT`.

    Raises StoreError for a scheme that is not known, a file that is not a store, or a server that does not answer.
    """
    scheme, _, path = uri.partition("://")
    if scheme == "sqlite":
        from agl.store.sqlite import SqliteStore

        return SqliteStore(path.removeprefix("/"), uri=uri)
    if scheme in ("http", "https"):
        from agl.store.http.client import HttpStore

        return HttpStore(uri)
    if scheme == "memory":
        from agl.store.sqlite import SqliteStore

        return SqliteStore(":memory:", uri=uri)
    if scheme == "postgresql":
        return _open_postgres(uri)
    if scheme == "cassandra":
        return _open_cassandra(uri)
    raise StoreError(
        f"store URI {uri!r} has the scheme {scheme!r}; known are"
        " sqlite:///path.db, postgresql://user:password@host/database, cassandra://host1,host2,host3/keyspace,"
        " http(s)://host:port and memory://"
    )


def _open_postgres(uri: str) -> Store:
    try:
        from agl.store.postgres import PostgresStore
    except ImportError as error:
        raise StoreError("a postgresql:// store needs psycopg: pip install 'agl-core[postgres]'") from error
    return PostgresStore(uri)


def _open_cassandra(uri: str) -> Store:
    try:
        from agl.store.cassandra import CassandraStore
    except ImportError as error:
        raise StoreError("a cassandra:// store needs cassandra-driver: pip install 'agl-core[cassandra]'") from error
    return CassandraStore(uri)
