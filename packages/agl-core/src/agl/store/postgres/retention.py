"""`gc` in PostgreSQL: also deletes the bodies of deleted spans, and drops the partitions of days without spans."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from agl.store.membership import SPANS_OF_KEY, owners_query
from agl.store.postgres import spans
from agl.store.postgres.database import PostgresConnection, PostgresDatabase
from agl.store.protocol import Collected
from agl.store.retention import SPAN_OVERHEAD_BYTES, Limits
from agl.store.sql.database import Connection
from agl.store.sql.retention import Retention

_USED_BYTES = f"SELECT coalesce(sum(size + {SPAN_OVERHEAD_BYTES}), 0) FROM spans"
_DELETE = f"DELETE FROM spans WHERE {SPANS_OF_KEY} AND arrived_ns <= :last_ns RETURNING day, size"
_DELETE_BODIES = """
DELETE FROM span_bodies body
WHERE day = :day AND NOT EXISTS (SELECT 1 FROM spans WHERE day = :day AND arrival = body.arrival)
"""
_PARTITIONS = """
SELECT substring(relid::text FROM '[0-9]+$')::integer AS day FROM pg_partition_tree('span_bodies') WHERE isleaf
ORDER BY day
"""


class PostgresRetention(Retention[PostgresDatabase]):
    POSITION = "day, arrival"
    MEMBERS = spans.MEMBERS
    OWNERS = owners_query("JOIN spans requester ON requester.asked = own.answered")
    ROLLOUTS_PER_TRANSACTION = 1

    def __init__(self, database: PostgresDatabase, limits: Limits) -> None:
        super().__init__(database, limits)
        self._excess_bytes = 0
        self._days: set[int] = set()
        """Days of deleted spans: their partitions have bodies to delete."""

    def collect(self) -> Collected:
        if self.limits.max_bytes is not None:
            used = self.database.read(lambda db: db.execute(_USED_BYTES).fetchall())[0][0]
            self._excess_bytes = int(used) - self.limits.max_bytes
        return super().collect()

    def release(self) -> None:
        for (day,) in self.database.read(lambda db: db.execute(_PARTITIONS).fetchall()):
            is_past, has_orphans = day < self.limits.now_ns // spans.DAY_NS, day in self._days
            self.database.write(partial(_clear, day=day, is_past=is_past, has_orphans=has_orphans))

    def is_over_size(self, db: Connection) -> bool:
        return self._excess_bytes > 0

    def prepare(self, db: Connection) -> None:
        # No wait for the disk: if the machine fails the rollout is still there, and the next `gc` deletes it.
        db.execute("SET LOCAL synchronous_commit TO off")

    def delete_spans(self, db: Connection, parameters: dict[str, Any]) -> Sequence[Any]:
        return db.execute(_DELETE, parameters).fetchall()

    def note_deleted(self, spans: Sequence[Any]) -> None:
        super().note_deleted(spans)
        self._days |= {day for day, _ in spans}
        self._excess_bytes -= sum(size + SPAN_OVERHEAD_BYTES for _, size in spans)


def _clear(db: PostgresConnection, day: int, is_past: bool, has_orphans: bool) -> None:
    """Delete the bodies of a day whose spans are deleted; drop the partition if that is all of them."""
    if is_past and not _has_spans(db, day):
        # Look again under the lock: a concurrent insert waits for it, and then finds no partition.
        db.execute("LOCK TABLE ONLY span_bodies IN ACCESS EXCLUSIVE MODE")
        if not _has_spans(db, day):
            db.execute(f"DROP TABLE IF EXISTS {spans.partition(day)}")
    elif has_orphans:
        db.execute(_DELETE_BODIES, {"day": day})


def _has_spans(db: PostgresConnection, day: int) -> bool:
    return db.execute("SELECT 1 FROM spans WHERE day = ? LIMIT 1", (day,)).fetchone() is not None
