"""Pending spans and decisions in an SQL database."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Generic

from agl.store.lifecycle import SpanHeartbeats
from agl.store.span_row import SpanRow, attempt_ids
from agl.store.sql.database import Connection, DatabaseT, write_many
from agl.store.sql.rollouts import write_spans
from agl.store.traffic import Pending, Place

_APPEND: Final = "INSERT INTO pending (arrived_ns, otlp) VALUES (?, ?)"
_LIST: Final = "SELECT place, arrived_ns FROM pending ORDER BY place"
_DELETE: Final = "DELETE FROM pending WHERE place = ?"
_DECIDE: Final = """
INSERT INTO decisions (name, decision, decided_ns) VALUES (?, ?, ?) ON CONFLICT (name) DO NOTHING
"""
DELETE_DECISIONS: Final = "DELETE FROM decisions WHERE decided_ns < ?"
_ROLLOUTS_OF_TRACE: Final = "SELECT DISTINCT rollout_id FROM spans WHERE trace_id = ? AND rollout_id IS NOT NULL"


class SqlTraffic(Generic[DatabaseT]):
    """The verbs of `TrafficStore`."""

    _database: DatabaseT
    _heartbeats: SpanHeartbeats

    def append_pending(self, rows: Sequence[SpanRow], *, now_ns: int | None = None) -> None:
        arrived_ns, attempts = now_ns or self._database.now_ns(), attempt_ids(rows)

        def append(db: Connection) -> None:
            db.executemany(_APPEND, [(arrived_ns, row.otlp) for row in rows])

        write_spans(self._database, append, attempts, arrived_ns, self._heartbeats)

    def list_pending(self) -> Pending:
        # The clock first: what arrives meanwhile is not older.
        now_ns = self._database.now_ns()
        return Pending(dict(self._database.read(lambda db: db.execute(_LIST).fetchall())), now_ns)

    def read_pending(self, places: Sequence[Place]) -> dict[Place, bytes]:
        wanted: Sequence[Any] = places
        return dict(self._database.read(lambda db: db.select_by_id("place, otlp", "pending", "place", wanted)))

    def delete_pending(self, places: Sequence[Place]) -> None:
        write_many(self._database, _DELETE, [(place,) for place in sorted(places)])

    def decide(self, proposed: Mapping[str, str]) -> dict[str, str]:
        now_ns = self._database.now_ns()

        def decide(db: Connection) -> dict[str, str]:
            # Sorted: two transactions that write the same names in different orders would deadlock.
            db.executemany(_DECIDE, [(*item, now_ns) for item in sorted(proposed.items())])
            return dict(db.select_by_id("name, decision", "decisions", "name", proposed))

        return self._database.write(decide)

    def rollouts_of_trace(self, trace_id: str) -> list[str]:
        trace = bytes.fromhex(trace_id)
        return [name for (name,) in self._database.read(lambda db: db.execute(_ROLLOUTS_OF_TRACE, (trace,)).fetchall())]
