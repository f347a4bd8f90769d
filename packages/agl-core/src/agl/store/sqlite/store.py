"""The store in a SQLite file."""

import time
from collections.abc import Sequence

from agl.store.end_notifier import EndNotifier
from agl.store.span_row import SpanRow, attempt_ids
from agl.store.sql.database import Connection
from agl.store.sql.rollouts import heartbeat_known
from agl.store.sql.store import SqlStore
from agl.store.sqlite import spans
from agl.store.sqlite.database import SqliteDatabase
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

    def append_rows(self, rows: Sequence[SpanRow]) -> int:
        now_ns = time.time_ns()
        batch, attempts = spans.Batch.of(rows, now_ns), attempt_ids(rows)

        def append(db: Connection) -> int:
            if attempts:
                heartbeat_known(db, attempts, now_ns)
            return spans.insert(db, batch)

        return self._database.write(append) if rows else 0

    def query_rows(self, rollout_id: str) -> list[bytes]:
        found = self._database.read(lambda db: spans.query(db, rollout_id))
        if found is None and self._database.is_read_only:
            return self._database.read(lambda db: spans.query_read_only(db, rollout_id))
        while found is None:
            # Query in the transaction of the last step: other threads may append new asks all the time.
            found = self._database.write(lambda db: None if spans.index_new_asks(db) else spans.query(db, rollout_id))
        return found
