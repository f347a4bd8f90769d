"""A SQLite database with many readers and one writer thread, which commits the changes of many callers at once."""

import os
import queue
import sqlite3
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from agl.errors import DamageError, InputError, StoreError
from agl.store.clock import Clock
from agl.store.migration import Migrations, pending_statements
from agl.store.sql.database import Connection, Rows

IN_MEMORY = ":memory:"
_APPLICATION_ID = 0x41474C31  # "AGL1": identifies a store among SQLite files.
_BUSY_TIMEOUT_S = 30.0
_MAX_JOBS_PER_COMMIT = 256
_DAMAGED = (
    "the file is damaged: stop what writes to it, and restore a backup, or keep what is sound with `agl store repair` "
    "(`agl store check` lists the errors, `agl store backup` makes a backup)"
)
_DAMAGE_CODES = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_ADVICE = {
    sqlite3.SQLITE_FULL: "make room on the disk; `agl store gc` then frees more",
    sqlite3.SQLITE_IOERR: "look at the disk: it may be full, or a file over its size limit",
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: "name another file; or, if this was a store, its beginning is damaged: restore a backup",
    sqlite3.SQLITE_BUSY: f"another process has locked it for more than {_BUSY_TIMEOUT_S:g} s; end it or try again",
    sqlite3.SQLITE_READONLY: "the file or its folder is read-only: change the permission or the user, or copy the file",
    sqlite3.SQLITE_CANTOPEN: "look at the permissions of the file and its folder; if that is read-only, copy the file, "
    "with the files FILE-wal and FILE-shm, to another",
}
_INPUT_ERRORS = (sqlite3.DataError, sqlite3.IntegrityError, sqlite3.ProgrammingError, OverflowError, UnicodeEncodeError)
_NEW_FILE_SETTINGS = ("page_size = 16384", "auto_vacuum = INCREMENTAL")
"""A page holds several spans; incremental vacuum can return the pages that `gc` frees."""
_WRITER_SETTINGS = (
    "journal_mode = WAL",
    "synchronous = FULL",  # A commit returns once it is on disk.
    "wal_autocheckpoint = 2000",  # Pages (32 MB): a page that many commits change is copied to the file once.
    "cache_size = -32768",  # KB.
)

Result = TypeVar("Result")


class SqliteConnection(sqlite3.Connection):
    """Implements `agl.store.sql.database.Connection`. The writer has the database to itself: nothing needs a lock."""

    def select_by_id(self, columns: str, table: str, key: str, ids: Iterable[str], *, lock: bool = False) -> Rows:
        query = f"SELECT {columns} FROM {table} WHERE {key} = ?"
        return [row for value in sorted({*ids}) for row in self.execute(query, (value,))]

    def lock_first(self, query: str, parameters: Sequence[Any] = ()) -> Any:
        return self.execute(query, parameters).fetchone()

    def json_text(self, column: str, key: str) -> str:
        return f"json_extract({column}, '$.{key}')"

    def lock_name(self, name: str) -> None:
        pass

    def executemany(self, sql: str, parameters: Iterable[Any], /) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().executemany(sql, parameters)

    def notify_end(self) -> None:
        pass


Work = Callable[[SqliteConnection], Result]


@dataclass(frozen=True, slots=True)
class _Job:
    work: Work[Any]
    done: Future[Any] = field(default_factory=Future)


class SqliteDatabase:
    """A database file shared by threads and processes, or one in memory (`:memory:`) shared by threads.

    Opening a file of an older schema version migrates it; `functions` are SQL functions of its migrations. A file that
    cannot be written can be read. Raises StoreError, with the path, if the file is not a store.
    """

    def __init__(
        self, path: str, migrations: Migrations, functions: Mapping[str, Callable[[bytes], Any]] | None = None
    ) -> None:
        self.path = path
        self._functions = functions or {}
        self.clock = Clock(path)
        self._readers: deque[SqliteConnection] = deque()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._connection = self._open(migrations)
        self._writer = threading.Thread(target=self._write_batches, name=f"agl-store {path}", daemon=True)
        self._writer.start()

    @property
    def is_read_only(self) -> bool:
        return self.path != IN_MEMORY and is_read_only(self.path)

    def now_ns(self) -> int:
        return self.clock.now_ns()

    def write(self, work: Work[Result]) -> Result:
        """Run `work` in the writer's next transaction; returns its result once the commit is on disk.

        `work` may run twice, of which the first is rolled back, so it must change nothing but the database. An
        exception of `work` rolls its changes back and is raised here. Raises InputError for values that SQLite cannot
        store, StoreError if the commit fails.
        """
        job = _Job(work)
        with self._closing:
            if self._closed:
                raise StoreError(f"the store {self.path} is closed")
            self._jobs.put(job)
        try:
            return job.done.result()
        except _INPUT_ERRORS as error:
            raise InputError(f"the store {self.path} can never keep this: {error}") from error
        except sqlite3.Error as error:
            raise store_error(f"the store {self.path} did not keep the change", error) from error

    def read(self, work: Work[Result]) -> Result:
        """Run `work`, which only reads, concurrently with the writer. Raises StoreError if the read fails."""
        if self.path == IN_MEMORY:  # Only the writer's connection can see it.
            return self.write(work)
        if self._closed:
            raise StoreError(f"the store {self.path} is closed")
        try:
            connection = self._take_reader()
            try:
                return _finished(work, connection)
            finally:
                self._readers.append(connection)
        except sqlite3.Error as error:
            raise store_error(f"the store {self.path} cannot be read", error) from error

    def close(self) -> None:
        """Commit the queued changes, then close all connections. May be called twice."""
        with self._closing:
            if not self._closed:
                self._jobs.put(None)
            self._closed = True
        self._writer.join()
        while self._readers:
            self._readers.pop().close()

    def _take_reader(self) -> SqliteConnection:
        try:
            return self._readers.pop()
        except IndexError:
            return connect(self.path)

    def _open(self, migrations: Migrations) -> SqliteConnection:
        try:
            if self.path != IN_MEMORY:
                Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            connection = connect(self.path)
            try:
                self._prepare(connection, migrations)
            except BaseException:
                connection.close()
                raise
        except sqlite3.Error as error:
            raise store_error(f"cannot open the store {self.path}", error) from error
        except OSError as error:
            raise StoreError(f"cannot open the store {self.path}: {error}") from error
        return connection

    def _prepare(self, connection: SqliteConnection, migrations: Migrations) -> None:
        self._check_owner(connection)
        version = pragma(connection, "user_version")
        if self.is_read_only:
            if version != len(migrations):
                raise StoreError(f"{self.path} has schema version {version} and is read-only; migrate a copy of it")
            return
        for setting in (*(() if version else _NEW_FILE_SETTINGS), *_WRITER_SETTINGS):
            connection.execute(f"PRAGMA {setting}")
        if version != len(migrations):  # An up-to-date store can be opened on a full disk.
            self._migrate(connection, migrations)

    def _migrate(self, connection: SqliteConnection, migrations: Migrations) -> None:
        for name, function in self._functions.items():
            connection.create_function(name, 1, function, deterministic=True)
        connection.execute("BEGIN IMMEDIATE")
        self._check_owner(connection)  # Again, now that no other process can change the file.
        for statement in pending_statements(self.path, pragma(connection, "user_version"), migrations):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(migrations)}")
        connection.execute("COMMIT")

    def _check_owner(self, connection: SqliteConnection) -> None:
        """Raise StoreError for a database that another program made. An empty one becomes a store."""
        empty = connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
        if not empty and pragma(connection, "application_id") != _APPLICATION_ID:
            raise StoreError(f"{self.path} is a SQLite database of another program, not a store; name another file")

    def _write_batches(self) -> None:
        for batch in self._batches():
            self._commit(batch)
        self._connection.close()

    def _batches(self) -> Iterator[list[_Job]]:
        """Jobs that were queued while the last batch was written, until the database is closed."""
        while (job := self._jobs.get()) is not None:
            batch = [job]
            while len(batch) < _MAX_JOBS_PER_COMMIT and not self._jobs.empty():
                if (job := self._jobs.get()) is None:
                    yield batch
                    return
                batch.append(job)
            yield batch

    def _commit(self, batch: list[_Job]) -> None:
        """Commit the batch as one transaction, and then return the results to the callers.

        If a job fails, each runs in its own transaction, so only that one fails. (Savepoints would copy changed pages.)
        """
        try:
            results = self._transact(batch)
        except sqlite3.OperationalError as error:  # Not a fault of one job: the file is full, locked or unreadable.
            for job in batch:
                job.done.set_exception(error)
        except Exception as error:  # noqa: BLE001 - raised in the caller; the writer must go on
            if len(batch) == 1:
                batch[0].done.set_exception(error)
                return
            for job in batch:
                self._commit([job])
        else:
            for job, result in zip(batch, results, strict=True):
                job.done.set_result(result)

    def _transact(self, batch: list[_Job]) -> list[Any]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            results = [_finished(job.work, self._connection) for job in batch]
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        return results


def _finished(work: Work[Result], connection: SqliteConnection) -> Result:
    """Result of `work`, which leaves no cursor behind: the connection's next user may be another thread.

    A cursor shares its prepared statement with later cursors of the same SQL. If the thread that got it as a result,
    or in the traceback of an exception, frees it while another executes that SQL, SQLite reports misuse.
    """
    try:
        result = work(connection)
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        raise
    if isinstance(result, Iterator):
        raise TypeError(f"a result of {work} is read after the end of its transaction: return a list, not {result!r}")
    return result


def connect(path: str | Path) -> SqliteConnection:
    """A connection to the file at `path`, which it creates; to one that only reads if the file cannot be written."""
    target, is_uri = str(path), False
    if target != IN_MEMORY and is_read_only(target):
        # Without a write-ahead log nobody writes, and SQLite need not create the files that writers share.
        has_log = Path(f"{target}-wal").exists()
        target, is_uri = f"{Path(target).absolute().as_uri()}?{'mode=ro' if has_log else 'immutable=1'}", True
    return sqlite3.connect(
        target,
        timeout=_BUSY_TIMEOUT_S,
        isolation_level=None,
        check_same_thread=False,
        factory=SqliteConnection,
        uri=is_uri,
    )


def is_read_only(path: str) -> bool:
    """Whether the file exists, and it or its folder cannot be written: SQLite then cannot create its log."""
    file = Path(path)
    needed = (file, file.absolute().parent)
    return file.exists() and not all(os.access(each, os.W_OK, effective_ids=True) for each in needed)


def pragma(connection: Connection, name: str) -> int:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def store_error(message: str, error: sqlite3.Error) -> StoreError:
    """The error for the caller: a DamageError if the content of the file is the reason."""
    kind = DamageError if is_damage(error) else StoreError
    return kind(f"{message}: {describe(error)}")


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the content of the file is the reason, not the disk, a lock or a permission."""
    # Python cannot decode a damaged text, which has no error code of SQLite.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE_CODES or "UTF-8" in str(error)


def describe(error: sqlite3.Error) -> str:
    """SQLite's message, and what the user can do about it."""
    advice = _ADVICE.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
    return f"{error}; {advice}" if advice else str(error)
