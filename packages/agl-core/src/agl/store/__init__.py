"""Stores: one protocol, one class for each backend, opened by URI.

protocol   the verbs of every store
rollout, states, lifecycle   rollouts, attempts, and how events change them
span_row               OTLP requests, parsed into one row for each span, and their checksums
membership, retention   which spans belong to a rollout, and which rollouts `gc` deletes
mapping, migration   database rows and schema versions
files                  folders as versions of a resource, in parts
traffic                production spans that are not decided yet, and the decisions
clock                  elapsed time, whatever the clock of the machine is set to
project                a database for each project
end_notifier, watchdog   waiting for rollouts, and ending overdue attempts
background             jobs at intervals, in a thread
sql, sqlite, postgres, cassandra, http   the backends
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from agl.config.section import DEFAULT_PROJECT, expand_home
from agl.errors import StoreError
from agl.secret_url import SecretUrl
from agl.store.project import database_name, split_project, uri_of_project
from agl.store.protocol import Collected, Resource, RolloutPage, Store
from agl.store.rollout import Attempt, Rollout
from agl.store.states import AttemptState, RolloutState

__all__ = [
    "Attempt",
    "AttemptState",
    "Collected",
    "Resource",
    "Rollout",
    "RolloutPage",
    "RolloutState",
    "Store",
    "open_store",
    "opened_projects",
    "opened_store",
    "sqlite_path",
]


def open_store(uri: str) -> Store:
    """Open the store at `uri`: `sqlite:///path.db`, `postgresql://`, `cassandra://`, `memory://`, or `http://HOST:PORT`
    for the store that `agl serve` serves. `?project=NAME` is the store of a project. Creates the database's tables if
    they do not exist.

    Raises StoreError for an unknown scheme, a file that is not a store, or a server that cannot be reached.
    """
    uri = SecretUrl(uri)
    scheme = uri.partition("://")[0]
    if scheme in ("sqlite", "memory"):
        from agl.store.sqlite.store import SqliteStore

        return SqliteStore(str(sqlite_path(uri) or ":memory:"), uri=uri)
    if scheme in ("http", "https"):
        from agl.store.http.client import HttpStore

        return HttpStore(uri)
    if scheme == "postgresql":
        return _open_postgres(uri)
    if scheme == "cassandra":
        return _open_cassandra(uri)
    raise StoreError(
        f"store URI {uri!r} has the scheme {scheme!r}; expected"
        " sqlite:///path.db, postgresql://user:password@host/database, cassandra://host1,host2,host3/keyspace,"
        " http(s)://host:port and memory://"
    )


@contextmanager
def opened_projects(store: Store, names: Iterable[str]) -> Iterator[dict[str, Store]]:
    """The store of each of the projects `names`, closed at the end, and `store`, which is that of the default project.

    Raises StoreError if one cannot be opened.
    """
    with ExitStack() as opened:
        stores = {DEFAULT_PROJECT: store}
        for name in sorted({*names} - stores.keys()):
            stores[name] = open_store(uri_of_project(store.uri, name).secret)
            opened.callback(stores[name].close)
        yield stores


@contextmanager
def opened_store(uri: str) -> Iterator[Store]:
    """`open_store`, closed at the end. If the block fails, a new file that is still empty is removed."""
    path = sqlite_path(uri)
    is_new = path is not None and not path.exists()
    store = open_store(uri)
    try:
        yield store
    except Exception:
        store.close()
        if path is not None and is_new:
            from agl.store.sqlite.maintenance import remove_if_empty

            remove_if_empty(path)
        raise
    finally:
        store.close()


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite store, None for other stores. Raises StoreError if the URI names no file."""
    base, project = split_project(uri)
    scheme, _, path = base.partition("://")
    if scheme != "sqlite":
        return None
    if not (name := path.removeprefix("/")):
        raise StoreError(f"store URI {uri!r} names no file; write sqlite:///path.db")
    try:
        file = expand_home(Path(name)).absolute()
    except ValueError as error:
        raise StoreError(f"store URI {uri!r}: {error}") from error
    if project == DEFAULT_PROJECT:
        return file
    return file.with_name(database_name(file.stem, project, ".") + file.suffix)


def _open_postgres(uri: SecretUrl) -> Store:
    try:
        from agl.store.postgres.store import PostgresStore
    except ImportError as error:
        raise StoreError("a postgresql:// store needs psycopg: pip install 'agl-core[postgres]'") from error
    return PostgresStore(uri)


def _open_cassandra(uri: SecretUrl) -> Store:
    try:
        from agl.store.cassandra.store import CassandraStore
    except ImportError as error:
        raise StoreError("a cassandra:// store needs cassandra-driver: pip install 'agl-core[cassandra]'") from error
    return CassandraStore(uri)
