"""Pending spans and decisions in Cassandra.

Pending spans are in partitions for each minute of arrival: tombstones of old ones are not in the way of newer ones.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from agl.store.cassandra.keyspace import Keyspace
from agl.store.cassandra.rollouts import heartbeat_by_span
from agl.store.cassandra.spans import check_size
from agl.store.lifecycle import SpanHeartbeats
from agl.store.span_row import SpanRow, attempt_ids
from agl.store.traffic import Pending, Place

_SHARDS: Final = 16
"""Partitions of a minute."""
_MINUTE_NS: Final = 60 * 10**9
_SETTLED_MINUTES: Final = 2
"""After this time no process is still in the middle of writing spans of a minute."""

_MINUTES = "SELECT minute FROM pending_minutes WHERE place = 0"
_PUT_MINUTE = "INSERT INTO pending_minutes (place, minute) VALUES (0, ?)"
_DELETE_MINUTE = "DELETE FROM pending_minutes WHERE place = 0 AND minute = ?"
_LIST = "SELECT span, arrived_ns FROM pending WHERE minute = ? AND shard = ?"
_PUT = "INSERT INTO pending (minute, shard, span, arrived_ns, otlp) VALUES (?, ?, ?, ?, ?)"
_READ = "SELECT otlp FROM pending WHERE minute = ? AND shard = ? AND span = ?"
_DELETE = "DELETE FROM pending WHERE minute = ? AND shard = ? AND span = ?"
_DECIDE = "INSERT INTO decisions (name, decision, decided_ns) VALUES (?, ?, ?) IF NOT EXISTS"
_DECISION = "SELECT decision FROM decisions WHERE name = ?"
_DECISIONS = "SELECT name, decided_ns FROM decisions"
_DELETE_DECISION = "DELETE FROM decisions WHERE name = ?"
_TRACE = "SELECT home FROM traces WHERE trace_id = ?"


class CassandraTraffic:
    """The verbs of `TrafficStore`. A place is minute, shard, and trace id with span id."""

    _keyspace: Keyspace
    _heartbeats: SpanHeartbeats

    def append_pending(self, rows: Sequence[SpanRow], *, now_ns: int | None = None) -> None:
        db, arrived_ns = self._keyspace, now_ns or self._keyspace.now_ns()
        minute = arrived_ns // _MINUTE_NS
        for row in rows:
            check_size(row)
        heartbeat_by_span(db, attempt_ids(rows), arrived_ns, self._heartbeats)
        db.write(_PUT_MINUTE, minute)
        places = [(minute, row.span_id[0] % _SHARDS, row.trace_id + row.span_id) for row in rows]
        db.run([(_PUT, (*place, arrived_ns, row.otlp)) for place, row in zip(places, rows, strict=True)])

    def list_pending(self) -> Pending:
        db, now_ns = self._keyspace, self._keyspace.now_ns()
        found: dict[Place, int] = {}
        for (minute,) in db.read(_MINUTES):
            shards = [(minute, shard) for shard in range(_SHARDS)]
            spans = db.run([(_LIST, key) for key in shards])
            arrived = {(*key, span): at_ns for key, rows in zip(shards, spans, strict=True) for span, at_ns in rows}
            if not arrived and minute < now_ns // _MINUTE_NS - _SETTLED_MINUTES:
                db.write(_DELETE_MINUTE, minute)
            found |= arrived
        return Pending(found, now_ns)

    def read_pending(self, places: Sequence[Place]) -> dict[Place, bytes]:
        results = self._keyspace.run([(_READ, place) for place in places])
        return {place: rows[0][0] for place, rows in zip(places, results, strict=True) if rows}

    def delete_pending(self, places: Sequence[Place]) -> None:
        self._keyspace.run([(_DELETE, place) for place in places])

    def decide(self, proposed: Mapping[str, str]) -> dict[str, str]:
        db, now_ns = self._keyspace, self._keyspace.now_ns()
        db.run([(_DECIDE, (name, decision, now_ns)) for name, decision in proposed.items()])
        results = db.run([(_DECISION, (name,)) for name in proposed])
        return {name: rows[0][0] for name, rows in zip(proposed, results, strict=True)}

    def rollouts_of_trace(self, trace_id: str) -> list[str]:
        return [home for (home,) in self._keyspace.read(_TRACE, bytes.fromhex(trace_id))]


def delete_decisions(db: Keyspace, before_ns: int) -> None:
    """Delete the decisions before `before_ns`."""
    old = [name for name, decided_ns in db.scan(_DECISIONS) if decided_ns < before_ns]
    db.run([(_DELETE_DECISION, (name,)) for name in old])
