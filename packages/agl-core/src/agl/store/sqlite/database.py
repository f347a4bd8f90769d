"""One SQLite database: opening it safely, many readers, one writer thread that commits for many callers at once."""

import queue
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from agl.errors import InputError, StoreError

Result = TypeVar("Result")
Work = Callable[[sqlite3.Connection], Result]

IN_MEMORY = ":memory:"
_APPLICATION_ID = 0x41474C31  # "AGL1": tells our files from other programs' databases.
_BUSY_TIMEOUT_S = 30.0
_MOST_JOBS_PER_COMMIT = 256
_DAMAGED = (
    "the file is damaged: stop what writes to it, keep a copy, and restore a backup (`agl store check` says what is "
    "wrong, `agl store backup` makes one)"
)
_ADVICE = {
    sqlite3.SQLITE_FULL: "make room on the disk; `agl store gc` then frees more",
    sqlite3.SQLITE_IOERR: "look at the disk: it may be full, or over a limit",
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: "name another file; or, if this was a store, its beginning is damaged: restore a backup",
    sqlite3.SQLITE_BUSY: "another process has been writing to it for too long",
    sqlite3.SQLITE_READONLY: "this user may not write to it",
}
_INPUT_ERRORS = (sqlite3.DataError, sqlite3.IntegrityError, sqlite3.ProgrammingError, OverflowError, UnicodeEncodeError)
_OF_A_NEW_FILE = ("page_size = 16384", "auto_vacuum = INCREMENTAL")
"""Several spans to a page; pages that `gc` frees can be given back."""
_OF_THE_WRITER = (
    "journal_mode = WAL",
    "synchronous = FULL",  # Acknowledged means on disk.
    "wal_autocheckpoint = 2000",  # Pages, 32 MB: a page that many commits change is copied home once.
    "cache_size = -32768",  # KB.
)


@dataclass(frozen=True, slots=True)
class _Job:
    work: Work[Any]
    done: Future[Any] = field(default_factory=Future)


class Database:
    """A database file shared by threads and processes, or one in memory (`:memory:`) shared by threads.

    `migrations` are the schema's statements, one tuple for each version; a file of an older version is brought up to
    date when it is opened. Raises StoreError naming the file when it is not a database of ours.
    """

    def __init__(self, path: str, migrations: tuple[tuple[str, ...], ...]) -> None:
        self.path = path
        self._readers: deque[sqlite3.Connection] = deque()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._connection = self._open(migrations)
        self._writer = threading.Thread(target=self._write_batches, name=f"agl-store {path}", daemon=True)
        self._writer.start()

    def write(self, work: Work[Result]) -> Result:
        """Run `work` in the writer's next transaction; returns its result once that is on disk.

        It may be run twice, the first time for nothing: it changes the database alone. What it raises is raised here,
        and nothing of it is kept. Raises InputError for values that SQLite cannot hold, StoreError when the commit
        fails.
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
            raise StoreError(f"the store {self.path} did not keep the change: {say(error)}") from error

    def read(self, work: Work[Result]) -> Result:
        """Run `work`, which only reads, beside the writer. Raises StoreError when the database cannot be read."""
        if self.path == IN_MEMORY:  # It lives in the writer's connection alone.
            return self.write(work)
        if self._closed:
            raise StoreError(f"the store {self.path} is closed")
        try:
            connection = self._take_reader()
            try:
                return work(connection)
            finally:
                self._readers.append(connection)
        except sqlite3.Error as error:
            raise StoreError(f"the store {self.path} cannot be read: {say(error)}") from error

    def close(self) -> None:
        """Commit what is queued, then close every connection. May be called twice."""
        with self._closing:
            if not self._closed:
                self._jobs.put(None)
            self._closed = True
        self._writer.join()
        while self._readers:
            self._readers.pop().close()

    def _take_reader(self) -> sqlite3.Connection:
        try:
            return self._readers.pop()
        except IndexError:
            return connect(self.path)

    def _open(self, migrations: tuple[tuple[str, ...], ...]) -> sqlite3.Connection:
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
            raise StoreError(f"cannot open the store {self.path}: {say(error)}") from error
        except OSError as error:
            raise StoreError(f"cannot open the store {self.path}: {error}") from error
        return connection

    def _prepare(self, connection: sqlite3.Connection, migrations: tuple[tuple[str, ...], ...]) -> None:
        self._check_owner(connection)
        version = _pragma(connection, "user_version")
        for setting in (*(() if version else _OF_A_NEW_FILE), *_OF_THE_WRITER):
            connection.execute(f"PRAGMA {setting}")
        if version != len(migrations):  # Else nothing is written: the disk may be full.
            self._migrate(connection, migrations)

    def _migrate(self, connection: sqlite3.Connection, migrations: tuple[tuple[str, ...], ...]) -> None:
        connection.execute("BEGIN IMMEDIATE")
        self._check_owner(connection)  # Again, now that no other process can change it.
        version = _pragma(connection, "user_version")
        if version > len(migrations):
            raise StoreError(
                f"{self.path} has schema version {version}, this program knows up to {len(migrations)}; update agl-core"
            )
        for statements in migrations[version:]:
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(migrations)}")
        connection.execute("COMMIT")

    def _check_owner(self, connection: sqlite3.Connection) -> None:
        """Refuse a database that another program made; an empty one is ours to fill."""
        empty = connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
        if not empty and _pragma(connection, "application_id") != _APPLICATION_ID:
            raise StoreError(f"{self.path} is a SQLite database of another program, not a store; name another file")

    def _write_batches(self) -> None:
        for batch in self._batches():
            self._commit(batch)
        self._connection.close()

    def _batches(self) -> Iterator[list[_Job]]:
        """What has queued up while the last batch was written, until the database is closed."""
        while (job := self._jobs.get()) is not None:
            batch = [job]
            while len(batch) < _MOST_JOBS_PER_COMMIT and not self._jobs.empty():
                if (job := self._jobs.get()) is None:
                    yield batch
                    return
                batch.append(job)
            yield batch

    def _commit(self, batch: list[_Job]) -> None:
        """One transaction for the whole batch; its callers hear of it only when it is on disk.

        Where a job of it fails, each gets a transaction of its own, so that it fails alone. (Savepoints would do as
        well, but then SQLite copies every page before it is changed.)
        """
        try:
            results = self._transact(batch)
        except sqlite3.OperationalError as error:  # The file, not a job: full, locked, unreadable.
            for job in batch:
                job.done.set_exception(error)
        except Exception as error:  # noqa: BLE001 - handed to the caller; the writer must live on
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
            results = [job.work(self._connection) for job in batch]
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        return results


def connect(path: str | Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def say(error: sqlite3.Error) -> str:
    """What SQLite says, and what to do where only the user can."""
    advice = _ADVICE.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
    return f"{error}; {advice}" if advice else str(error)
