"""One PostgreSQL database: its schema brought up to date, a pool of connections, errors that name it."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import psycopg
from psycopg.types.string import StrBinaryDumper, StrDumper
from psycopg_pool import ConnectionPool

from agl.errors import InputError, StoreError

Connection = psycopg.Connection[tuple[Any, ...]]
Result = TypeVar("Result")
Work = Callable[[Connection], Result]

SCHEMA: Final = "agl"
LOCK: Final = 0x41474C31
"""First half of our advisory locks ("AGL1"): other programs in the database have their own."""

_MOST_CONNECTIONS = 8
_CONNECT_TIMEOUT_S = 10
_POOL_TIMEOUT_S = 5.0
"""An exporter waits 10 s for its answer, and then would not hear that it may send again."""
_MOST_TRIES = 5

_SESSION = f"""
SET search_path TO {SCHEMA};
SET synchronous_commit TO on;
SET jit TO off;
CREATE TEMPORARY TABLE incoming (
    place integer, trace_id bytea, span_id bytea, rollout_id text, start_ns bigint, asked text, answered text,
    otlp bytea) WITH (toast_tuple_target = 8160) ON COMMIT DELETE ROWS;
ALTER TABLE incoming ALTER COLUMN otlp SET STORAGE EXTERNAL
"""
"""Bodies pass `incoming` as `span_bodies` keeps them: to compress them there took most of the time of a batch."""


def _encode(text: str) -> bytes:
    """What PostgreSQL's text cannot hold becomes U+FFFD or `?`: a strange id must not block the spans beside it."""
    return text.encode("utf-8", "replace").replace(b"\0", b"\xef\xbf\xbd")


class _Text(StrDumper):
    def dump(self, obj: str) -> bytes:
        return _encode(obj)


class _BinaryText(StrBinaryDumper):
    def dump(self, obj: str) -> bytes:
        return _encode(obj)


class Database:
    """A database shared by threads, processes and machines.

    `migrations` are the schema's statements, one tuple for each version; a schema of an older version is brought up
    to date. Raises StoreError, without the password, where the server cannot be reached or the schema is not ours.
    """

    def __init__(self, uri: str, migrations: tuple[tuple[str, ...], ...]) -> None:
        self.uri = uri
        self.name = without_password(uri)
        self._closed = False
        with self._errors("cannot open"), self.connect() as connection:
            self._migrate(connection, migrations)
            self._ahead_ns = _clock_ns(connection) - time.time_ns()
        self._pool = ConnectionPool(
            uri,
            min_size=1,
            max_size=_MOST_CONNECTIONS,
            timeout=_POOL_TIMEOUT_S,
            reconnect_timeout=_POOL_TIMEOUT_S,  # Then the next caller begins anew, without long pauses.
            kwargs={"autocommit": True, "connect_timeout": _CONNECT_TIMEOUT_S},
            configure=_configure,
            check=ConnectionPool.check_connection,  # After a restart of the server all are dead.
            name=f"agl-store {self.name}",
            open=True,
        )

    def now_ns(self) -> int:
        """Time by the clock of the server: those of the machines that share it may differ."""
        return time.time_ns() + self._ahead_ns

    def write(self, work: Work[Result]) -> Result:
        """Run `work` in a transaction; returns its result once that is on disk.

        What `work` raises is raised here, and nothing of it is kept. It runs again after a deadlock.
        """
        with self._errors("did not keep the change in"):
            for _ in range(_MOST_TRIES - 1):
                try:
                    return self._transact(work)
                except psycopg.errors.DeadlockDetected:
                    continue
            return self._transact(work)

    def read(self, work: Work[Result]) -> Result:
        """Run `work`, which only reads, outside of a transaction: each of its statements sees what is committed."""
        with self._errors("cannot read"), self._pool.connection() as connection:
            return work(connection)

    def connect(self) -> Connection:
        """A connection of the caller's own, beside the pool."""
        return psycopg.connect(self.uri, autocommit=True, connect_timeout=_CONNECT_TIMEOUT_S)

    def close(self) -> None:
        """Wait for nobody and close every connection that is not in use. May be called twice."""
        self._closed = True
        self._pool.close()

    def _transact(self, work: Work[Result]) -> Result:
        with self._pool.connection() as connection, connection.transaction():
            return work(connection)

    def _migrate(self, connection: Connection, migrations: tuple[tuple[str, ...], ...]) -> None:
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s, 0)", (LOCK,))
            version = self._version(connection)
            if version > len(migrations):
                raise StoreError(
                    f"{self.name} has schema version {version}, this program knows up to {len(migrations)};"
                    " update agl-core"
                )
            connection.execute(f"SET LOCAL search_path TO {SCHEMA}")
            for statement in (statement for statements in migrations[version:] for statement in statements):
                connection.execute(statement.encode())
            if version < len(migrations):
                connection.execute("UPDATE version SET version = %s", (len(migrations),))

    def _version(self, connection: Connection) -> int:
        """Of the schema, which is made where it is not there."""
        exists, is_ours = _one(
            connection,
            "SELECT to_regnamespace(%s) IS NOT NULL, to_regclass(%s) IS NOT NULL",
            SCHEMA,
            f"{SCHEMA}.version",
        )
        if exists and not is_ours:
            raise StoreError(f"the schema {SCHEMA!r} of {self.name} is of another program; name another database")
        if not exists:
            connection.execute(f"CREATE SCHEMA {SCHEMA}")
            connection.execute(f"CREATE TABLE {SCHEMA}.version (version integer NOT NULL)")
            connection.execute(f"INSERT INTO {SCHEMA}.version VALUES (0)")
        return _one(connection, f"SELECT version FROM {SCHEMA}.version")[0]

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        if self._closed:
            raise StoreError(f"the store {self.name} is closed")
        try:
            yield
        except (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.ProgramLimitExceeded) as error:
            raise InputError(f"the store {self.name} can never keep this: {str(error).strip()}") from error
        except psycopg.Error as error:
            # From None: the cause may quote the URI, and with it the password.
            raise StoreError(f"{what} the store {self.name}: {self._censor(str(error))}") from None

    def _censor(self, message: str) -> str:
        for secret in passwords(self.uri):
            message = message.replace(secret, "***")
        return message.strip()


_PASSWORDS = re.compile(r"(?<=[?&]password=)[^&#]+|(?<=[?&]sslpassword=)[^&#]+|(?<=://)([^/?#]*)(?=@)")


def passwords(uri: str) -> list[str]:
    """What of `uri` is secret, as it is written there."""
    found = []
    for match in _PASSWORDS.finditer(uri):
        secret = match[0] if match[1] is None else match[1].partition(":")[2]
        found.extend([secret] if secret else [])
    return found


def without_password(uri: str) -> str:
    """`uri` to be shown."""
    for secret in passwords(uri):
        uri = uri.replace(f":{secret}@", ":***@").replace(f"password={secret}", "password=***")
    return uri


def _configure(connection: Connection) -> None:
    connection.adapters.register_dumper(str, _BinaryText)
    connection.adapters.register_dumper(str, _Text)  # Last: it is preferred where both will do.
    connection.execute(_SESSION)


def _clock_ns(connection: Connection) -> int:
    return _one(connection, "SELECT (extract(epoch FROM clock_timestamp()) * 1000000000)::bigint")[0]


def _one(connection: Connection, query: Any, *values: Any) -> tuple[Any, ...]:
    row = connection.execute(query, values).fetchone()
    assert row is not None
    return row
