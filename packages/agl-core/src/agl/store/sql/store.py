"""The store class of the SQL backends."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

from agl.store.end_notifier import EndNotifier
from agl.store.lifecycle import SpanHeartbeats
from agl.store.mapping import read_cursor, to_cursor
from agl.store.protocol import Collected, RolloutPage, Store
from agl.store.retention import Limits
from agl.store.sql.damage import damaged_rows, delete_row
from agl.store.sql.database import Connection, DatabaseT, Rows
from agl.store.sql.resources import SqlResources
from agl.store.sql.retention import Retention, parameters_of
from agl.store.sql.rollouts import SqlRollouts
from agl.store.sql.traffic import SqlTraffic

_ROLLOUT_IDS = """
SELECT rollout_id, trace_id FROM (
    SELECT rollout_id, NULL AS trace_id, min(arrival) AS first FROM spans WHERE rollout_id IS NOT NULL
    GROUP BY rollout_id
    UNION ALL
    SELECT NULL, trace_id, min(arrival) FROM spans GROUP BY trace_id HAVING max(rollout_id) IS NULL
) found ORDER BY first
"""

_IS_FIRST = """
CASE WHEN rollout_id IS NULL THEN NOT EXISTS (
    SELECT 1 FROM spans other WHERE other.trace_id = own.trace_id AND (other.rollout_id IS NOT NULL OR {is_earlier})
) ELSE NOT EXISTS (SELECT 1 FROM spans other WHERE other.rollout_id = own.rollout_id AND {is_earlier}) END
"""
_SPANS_PER_LISTING = 512
_AFTER_ALL = 2**31 - 1


class SqlStore(SqlRollouts[DatabaseT], SqlResources[DatabaseT], SqlTraffic[DatabaseT], Store):
    """All of `Store` except `append_rows` and `query_rows_by_rollout`, which depend on how a backend stores spans."""

    LAST_SPAN: ClassVar[str]
    """Query for the rollout that the last span to arrive names, if any, and for its trace."""
    RETENTION: ClassVar[type[Retention[Any]]]

    def __init__(self, uri: str, database: DatabaseT, ends: EndNotifier) -> None:
        self.uri = uri
        self._database = database
        self._ends = ends
        self._heartbeats = SpanHeartbeats()

    def count_spans(self) -> int:
        return self._database.read(lambda db: db.execute("SELECT count(*) FROM spans").fetchone()[0])

    def last_rollout_id(self) -> str | None:
        last = self._database.read(lambda db: db.execute(self.LAST_SPAN).fetchone())
        if last is None or last[0] is not None:
            return last and last[0]
        return min(self._owners([last[1]])[last[1]], default=last[1].hex())

    def rollout_ids(self) -> list[str]:
        rows = self._database.read(lambda db: db.execute(_ROLLOUT_IDS).fetchall())
        return [rollout_id or trace_id.hex() for rollout_id, trace_id in rows]

    def list_rollouts(self, limit: int = 50, cursor: str | None = None) -> RolloutPage:
        """Walks the spans from the newest to the oldest, to those that are the first of their rollouts."""
        position = self.RETENTION.POSITION.split(", ")
        place = read_cursor(cursor, len(position)) if cursor else (_AFTER_ALL, 2**62)[-len(position) :]
        found: list[str] = []
        while True:
            spans = self._database.read(partial(_newest_spans, position, place))
            unnamed = [trace_id for *_, rollout_id, trace_id, is_first in spans if is_first and not rollout_id]
            owners = self._owners(unnamed[: limit - len(found)])
            for *at, rollout_id, trace_id, is_first in spans:
                if len(found) == limit or (is_first and not rollout_id and trace_id not in owners):
                    return RolloutPage(found, to_cursor(place))
                if is_first and (rollout_id or not owners[trace_id]):
                    found.append(rollout_id or trace_id.hex())
                place = at
            if len(spans) < _SPANS_PER_LISTING:
                return RolloutPage(found, None)

    def damaged_rows(self) -> list[str]:
        return [table.finding(row) for table, row in damaged_rows(self._database)]

    def delete_spans(self, rollout_id: str, damaged: Sequence[tuple[bytes, bytes]]) -> None:
        """See `agl.store.repair`."""
        retention, last_ns = self.RETENTION(self._database, Limits.of(None, None, 0)), self._database.now_ns()

        def delete(db: Connection) -> list[Any]:
            keys = retention.keys(db, rollout_id)[1]
            deleted = [
                span for key in keys for span in retention.delete_spans(db, parameters_of(key) | {"last_ns": last_ns})
            ]
            db.executemany("DELETE FROM spans WHERE trace_id = ? AND span_id = ?", damaged)
            return deleted

        retention.note_deleted(self._database.write(delete))
        retention.release()

    def delete_damaged_rows(self, keep: Callable[[str, Sequence[Any]], None]) -> None:
        """See `agl.store.repair`."""
        for table, row in [*damaged_rows(self._database)]:
            keep(table.finding(row), row)
            self._database.write(lambda db, table=table, row=row: delete_row(db, table, row))

    def gc(
        self, *, older_than_s: float | None = None, max_bytes: int | None = None, now_ns: int | None = None
    ) -> Collected:
        limits = Limits.of(older_than_s, max_bytes, now_ns or self._database.now_ns())
        return self.RETENTION(self._database, limits).collect()

    def close(self) -> None:
        self._database.close()

    def _owners(self, traces: Sequence[bytes]) -> dict[bytes, list[str]]:
        """For each trace the rollouts to which its spans belong that name none."""
        for trace_id in traces:
            self._index_trace(trace_id)

        def read(db: Connection) -> dict[bytes, list[str]]:
            query = self.RETENTION.OWNERS
            return {trace: [name for (name,) in db.execute(query, {"trace": trace}).fetchall()] for trace in traces}

        return self._database.read(read)

    def _index_trace(self, trace_id: bytes) -> None:
        """Make sure that the query for the owners of this trace finds all that it is joined by."""


def _newest_spans(position: Sequence[str], before: Sequence[int], db: Connection) -> Rows:
    """The newest spans with a `position` less than `before`, and of each whether it is the first of its rollout."""
    places, order = ", ".join(position), ", ".join(f"{name} DESC" for name in position)
    other, own = (", ".join(f"{table}.{name}" for name in position) for table in ("other", "own"))
    is_first = _IS_FIRST.format(is_earlier=f"({other}) < ({own})")
    return db.execute(
        f"SELECT {places}, rollout_id, trace_id, {is_first} FROM spans own"
        f" WHERE ({places}) < ({', '.join('?' * len(position))}) ORDER BY {order} LIMIT {_SPANS_PER_LISTING}",
        tuple(before),
    ).fetchall()
