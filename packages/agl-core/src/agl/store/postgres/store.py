"""The store in a PostgreSQL database."""

from collections.abc import Sequence
from functools import partial
from typing import Final

from agl.secret_url import SecretUrl
from agl.store.end_notifier import EndNotifier
from agl.store.postgres import spans
from agl.store.postgres.database import PostgresDatabase
from agl.store.postgres.listener import Listener
from agl.store.postgres.retention import PostgresRetention
from agl.store.postgres.schema import MIGRATIONS
from agl.store.rollout import Rollout
from agl.store.span_row import SpanRow, attempt_ids
from agl.store.sql.rollouts import write_spans
from agl.store.sql.store import SqlStore

_POLL_S: Final = 1.0
"""Poll interval of waiting callers, in case the server sends no notification."""


class PostgresStore(SqlStore[PostgresDatabase]):
    """A store in the schema `agl`, or that of a project, of the database at `uri`, shared by any number of machines.

    Raises StoreError if the server cannot be reached or another program owns the schema. While the server restarts,
    verbs raise StoreError; afterwards they work again.
    """

    LAST_SPAN = spans.LAST_SPAN
    RETENTION = PostgresRetention

    def __init__(self, uri: str) -> None:
        url = SecretUrl(uri)
        super().__init__(url, PostgresDatabase(url, MIGRATIONS), EndNotifier(_POLL_S))
        self._listener = Listener(self._database, self._ends)

    def append_rows(self, rows: Sequence[SpanRow]) -> int:
        now_ns = self._database.now_ns()
        unique, attempts = spans.without_duplicates(rows), attempt_ids(rows)

        def append() -> int:
            write = partial(spans.insert, rows=unique, now_ns=now_ns)
            return write_spans(self._database, write, attempts, now_ns, self._heartbeats)

        try:
            return append() if unique else 0
        except spans.MissingPartition:  # These are the first spans of the day.
            self._database.write(lambda db: spans.make_partition(db, now_ns // spans.DAY_NS))
            return append()

    def query_rows_by_rollout(self, rollout_ids: Sequence[str]) -> dict[str, list[bytes]]:
        return self._database.read(lambda db: spans.query(db, rollout_ids))

    def wait_for_rollouts(self, rollout_ids: Sequence[str], timeout_s: float | None = None) -> list[Rollout]:
        self._listener.start()
        return super().wait_for_rollouts(rollout_ids, timeout_s)

    def close(self) -> None:
        self._listener.close()
        super().close()
