"""`gc` in SQLite, in transactions short enough for writers in between; gives free pages back to the disk at the end."""

from collections.abc import Sequence
from typing import Any, Final

from agl.store.membership import SPANS_OF_KEY, owners_query
from agl.store.protocol import Collected
from agl.store.sql.database import Connection
from agl.store.sql.retention import Retention
from agl.store.sqlite import spans
from agl.store.sqlite.database import SqliteDatabase, pragma

_PAGES_PER_STEP: Final = 500

_DELETE_ASKS = f"""
DELETE FROM asks WHERE (response_id, arrival) IN (SELECT asked, arrival FROM spans WHERE {SPANS_OF_KEY})
"""
_DELETE = f"DELETE FROM spans WHERE {SPANS_OF_KEY} AND arrived_ns <= :last_ns RETURNING arrival"


class SqliteRetention(Retention[SqliteDatabase]):
    POSITION = "arrival"
    MEMBERS = spans.MEMBERS
    OWNERS = owners_query(
        "JOIN asks ask ON ask.response_id = own.answered JOIN spans requester ON requester.arrival = ask.arrival"
    )
    ROLLOUTS_PER_TRANSACTION = 200

    def collect(self) -> Collected:
        while self.database.write(spans.index_new_asks):
            pass
        collected = super().collect()
        while self.database.write(_free_some_pages):
            pass
        return collected

    def is_over_size(self, db: Connection) -> bool:
        return self.limits.max_bytes is not None and _used_bytes(db) > self.limits.max_bytes

    def prepare(self, db: Connection) -> None:
        spans.index_new_asks(db)

    def delete_spans(self, db: Connection, parameters: dict[str, Any]) -> Sequence[Any]:
        db.execute(_DELETE_ASKS, parameters)
        return db.execute(_DELETE, parameters).fetchall()


def _used_bytes(db: Connection) -> int:
    """Size of the file without its free pages."""
    return (pragma(db, "page_count") - pragma(db, "freelist_count")) * pragma(db, "page_size")


def _free_some_pages(db: Connection) -> bool:
    """Cut some free pages off the file; returns whether more can be cut. Files of version 1 keep theirs."""
    before = pragma(db, "freelist_count")
    db.execute(f"PRAGMA incremental_vacuum({_PAGES_PER_STEP})").fetchall()
    return 0 < pragma(db, "freelist_count") < before
