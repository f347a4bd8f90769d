"""A PostgreSQL database: a pool of connections, schema migration, and errors without the password."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Final, TypeVar

import psycopg
from psycopg.types.string import StrBinaryDumper, StrDumper
from psycopg_pool import ConnectionPool

from agl.errors import InputError, StoreError
from agl.secret_url import SecretUrl
from agl.store.clock import Clock
from agl.store.migration import Migrations, pending_statements
from agl.store.project import database_name, split_project
from agl.store.sql.database import Rows

SCHEMA: Final = "agl"
"""That of the default project; other projects have one each beside it."""
ENDS_CHANNEL: Final = "agl_endings"
"""NOTIFY channel for rollouts that may have ended."""
LOCK: Final = 0x41474C31
"""First half of our advisory locks ("AGL1"), which keeps them apart from those of other programs."""

_MAX_CONNECTIONS = 8
_CONNECT_TIMEOUT_S = 10
_POOL_TIMEOUT_S = 5.0
"""Shorter than the 10 s that an exporter waits: later it would not receive the request to retry."""
_MAX_TRIES = 5
_UNDECODABLE: Final = r"\\u(0000|[dD][89a-fA-F][0-9a-fA-F]{2})"
"""Escapes in JSON. What looks like one behind an escaped backslash may be replaced too: the JSON stays valid."""

_SESSION = """
SET search_path TO {schema};
SET synchronous_commit TO on;
SET jit TO off;
CREATE TEMPORARY TABLE incoming (
    place integer, trace_id bytea, span_id bytea, rollout_id text, start_ns bigint, asked text, answered text,
    checksum bigint, otlp bytea) WITH (toast_tuple_target = 8160) ON COMMIT DELETE ROWS;
ALTER TABLE incoming ALTER COLUMN otlp SET STORAGE EXTERNAL
"""
"""`incoming` stores `otlp` uncompressed like `span_bodies`: compression took most of the time of a batch."""

_CLOCK_NS = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000000)::bigint"
_PLACEHOLDER = re.compile(r"\?|(?<![:\w]):(\w+)")

Result = TypeVar("Result")


class PostgresConnection:
    """Implements `agl.store.sql.database.Connection` with a connection of psycopg."""

    def __init__(self, connection: psycopg.Connection[tuple[Any, ...]]) -> None:
        self.cursor = connection.cursor

    def execute(self, sql: str, parameters: Any = None, /) -> psycopg.Cursor[tuple[Any, ...]]:
        return self.cursor().execute(_psycopg_sql(sql), parameters)

    def executemany(self, sql: str, parameters: Iterable[Any], /) -> None:
        self.cursor().executemany(_psycopg_sql(sql), parameters)

    def select_by_id(self, columns: str, table: str, key: str, ids: Iterable[str], *, lock: bool = False) -> Rows:
        query = f"SELECT {columns} FROM {table} WHERE {key} = ANY(?) ORDER BY {key}{' FOR UPDATE' if lock else ''}"
        return self.execute(query, (list(ids),)).fetchall()

    def lock_first(self, query: str, parameters: Sequence[Any] = ()) -> Any:
        # If other transactions hold all rows, wait for one: a heartbeat, for example, releases its row soon.
        found = self.execute(f"{query} FOR UPDATE SKIP LOCKED", parameters).fetchone()
        return found or self.execute(f"{query} FOR UPDATE", parameters).fetchone()

    def json_text(self, column: str, key: str) -> str:
        # It decodes all of the object, and fails at a NUL or half a surrogate pair anywhere in it. No name has one.
        decodable = rf"regexp_replace({column}, '{_UNDECODABLE}', '\\u0020', 'g')"
        return f"({decodable}::json ->> '{key}')"

    def lock_name(self, name: str) -> None:
        self.execute("SELECT pg_advisory_xact_lock(?, hashtext(?))", (LOCK, name))

    def notify_end(self) -> None:
        self.execute(f"NOTIFY {ENDS_CHANNEL}")


Work = Callable[[PostgresConnection], Result]


@cache
def _psycopg_sql(sql: str) -> bytes:
    return _PLACEHOLDER.sub(lambda match: f"%({match[1]})s" if match[1] else "%s", sql).encode()


def _encode(text: str) -> bytes:
    """UTF-8 with U+FFFD or `?` for what PostgreSQL cannot store: one such id must not block a batch of spans."""
    return text.encode("utf-8", "replace").replace(b"\0", b"\xef\xbf\xbd")


class _Text(StrDumper):
    def dump(self, obj: str) -> bytes:
        return _encode(obj)


class _BinaryText(StrBinaryDumper):
    def dump(self, obj: str) -> bytes:
        return _encode(obj)


class PostgresDatabase:
    """A database shared by threads, processes and machines.

    Migrates an older schema. Raises StoreError, without the password, if the server is down or the schema is not ours.
    """

    def __init__(self, uri: SecretUrl, migrations: Migrations) -> None:
        self.name = uri
        self._address, project = split_project(uri)
        self._schema = database_name(SCHEMA, project)
        self._closed = False
        with self._errors("cannot open"), self.connect() as connection:
            db = PostgresConnection(connection)
            with connection.transaction():
                self._migrate(db, migrations)
            self._clock = Clock(self.name, _one(db, _CLOCK_NS)[0])
        self._pool = ConnectionPool(
            self._address.secret,
            min_size=1,
            max_size=_MAX_CONNECTIONS,
            timeout=_POOL_TIMEOUT_S,
            reconnect_timeout=_POOL_TIMEOUT_S,  # Then the next call starts over with short pauses.
            kwargs={"autocommit": True, "connect_timeout": _CONNECT_TIMEOUT_S},
            configure=self._configure,
            check=ConnectionPool.check_connection,  # A restart of the server closes all.
            name=f"agl-store {self.name}",
            open=True,
        )

    def now_ns(self) -> int:
        """Unix time by the clock of the server: the clocks of its clients may differ."""
        return self._clock.now_ns()

    def write(self, work: Work[Result]) -> Result:
        """Run `work` in a transaction; returns its result once the commit is on disk.

        An exception of `work` rolls its changes back and is raised here. After a deadlock `work` runs again.
        """
        with self._errors("did not keep the change in"):
            for _ in range(_MAX_TRIES - 1):
                try:
                    return self._transact(work)
                except psycopg.errors.DeadlockDetected:
                    continue
            return self._transact(work)

    def read(self, work: Work[Result]) -> Result:
        """Run `work`, which only reads, without a transaction: each statement sees the latest commits."""
        with self._errors("cannot read"), self._pool.connection() as connection:
            return work(PostgresConnection(connection))

    def connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        """A new connection that is not of the pool."""
        return psycopg.connect(self._address.secret, autocommit=True, connect_timeout=_CONNECT_TIMEOUT_S)

    def close(self) -> None:
        """Close all connections that are not in use, without waiting for the others. May be called twice."""
        self._closed = True
        self._pool.close()

    def _transact(self, work: Work[Result]) -> Result:
        with self._pool.connection() as connection, connection.transaction():
            return work(PostgresConnection(connection))

    def _migrate(self, db: PostgresConnection, migrations: Migrations) -> None:
        db.execute("SELECT pg_advisory_xact_lock(?, 0)", (LOCK,))
        version = self._version(db)
        db.execute(f"SET LOCAL search_path TO {self._schema}")
        for statement in pending_statements(self.name, version, migrations):
            db.execute(statement)
        if version < len(migrations):
            db.execute("UPDATE version SET version = ?", (len(migrations),))

    def _version(self, db: PostgresConnection) -> int:
        """Version of the schema, which is created if it does not exist."""
        schema = self._schema
        query = f"SELECT to_regnamespace('{schema}') IS NOT NULL, to_regclass('{schema}.version') IS NOT NULL"
        exists, is_ours = _one(db, query)
        if exists and not is_ours:
            raise StoreError(f"another program owns the schema {schema!r} of {self.name}; name another database")
        if not exists:
            db.execute(f"CREATE SCHEMA {schema}")
            db.execute(f"CREATE TABLE {schema}.version (version integer NOT NULL)")
            db.execute(f"INSERT INTO {schema}.version VALUES (0)")
        return _one(db, f"SELECT version FROM {schema}.version")[0]

    def _configure(self, connection: psycopg.Connection[tuple[Any, ...]]) -> None:
        connection.adapters.register_dumper(str, _BinaryText)
        connection.adapters.register_dumper(str, _Text)  # Last, so that it is preferred.
        connection.execute(_SESSION.format(schema=self._schema).encode())

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        if self._closed:
            raise StoreError(f"the store {self.name} is closed")
        try:
            yield
        except (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.ProgramLimitExceeded) as error:
            raise InputError(f"the store {self.name} can never keep this: {str(error).strip()}") from error
        except psycopg.Error as error:
            # From None: the cause may quote the URI with its password.
            raise StoreError(f"{action} the store {self.name}: {self.name.hide(str(error)).strip()}") from None


def _one(db: PostgresConnection, query: str) -> tuple[Any, ...]:
    row = db.execute(query).fetchone()
    assert row is not None
    return row
