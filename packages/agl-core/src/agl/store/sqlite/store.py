"""The store in a SQLite file."""

from collections.abc import Sequence
from functools import partial

from agl.errors import StoreError
from agl.store.clock import boot_id
from agl.store.end_notifier import EndNotifier
from agl.store.span_row import SpanRow, attempt_ids
from agl.store.sql.database import Connection
from agl.store.sql.rollouts import write_spans
from agl.store.sql.store import SqlStore
from agl.store.sqlite import spans
from agl.store.sqlite.database import IN_MEMORY, SqliteDatabase
from agl.store.sqlite.retention import SqliteRetention
from agl.store.sqlite.schema import FUNCTIONS, MIGRATIONS


class SqliteStore(SqlStore[SqliteDatabase]):
    """A store in the file at `path` (`:memory:` for none), safe for several threads and processes.

    Raises StoreError if the file is not a store.
    """

    LAST_SPAN = spans.LAST_SPAN
    RETENTION = SqliteRetention

    def __init__(self, path: str, *, uri: str) -> None:
        super().__init__(uri, SqliteDatabase(path, MIGRATIONS, FUNCTIONS), EndNotifier())
        self._set_clock()

    def _set_clock(self) -> None:
        """Take the clock of the processes that had the file open before, or give it ours.

        Only of the same run of this machine: the time since its start begins anew with each.
        """
        clock, boot = self._database.clock, boot_id()
        if boot is None or self._database.path == IN_MEMORY:
            return
        if (offset_ns := self._database.read(lambda db: _clock_offset(db, boot))) is None:
            try:
                offset_ns = self._database.write(lambda db: _set_clock_offset(db, boot, clock.offset_ns))
            except StoreError:  # The file is read-only or the disk full: nobody leases there.
                return
        clock.offset_ns = offset_ns

    def append_rows(self, rows: Sequence[SpanRow]) -> int:
        now_ns = self._database.now_ns()
        batch, attempts = spans.Batch.of(rows, now_ns), attempt_ids(rows)

        write = partial(spans.insert, batch=batch)
        return write_spans(self._database, write, attempts, now_ns, self._heartbeats) if rows else 0

    def _index_trace(self, trace_id: bytes) -> None:
        self.query_rows(trace_id.hex())

    def query_rows_by_rollout(self, rollout_ids: Sequence[str]) -> dict[str, list[bytes]]:
        found = self._database.read(lambda db: spans.query(db, rollout_ids))
        if found is None and self._database.is_read_only:
            return self._database.read(lambda db: spans.query_read_only(db, rollout_ids))
        while found is None:
            # Query in the transaction of the last step: other threads may append new asks all the time.
            found = self._database.write(lambda db: None if spans.index_new_asks(db) else spans.query(db, rollout_ids))
        return found


def _clock_offset(db: Connection, boot: str) -> int | None:
    row = db.execute("SELECT offset_ns FROM clock WHERE boot_id = ?", (boot,)).fetchone()
    return row and row[0]


def _set_clock_offset(db: Connection, boot: str, offset_ns: int) -> int:
    """Returns the offset of the process that was first."""
    db.execute("DELETE FROM clock WHERE boot_id <> ?", (boot,))
    return db.execute(
        "INSERT INTO clock VALUES (?, ?) ON CONFLICT (boot_id) DO UPDATE SET offset_ns = offset_ns RETURNING offset_ns",
        (boot, offset_ns),
    ).fetchone()[0]
