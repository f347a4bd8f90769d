"""What `gc` deletes: rollouts that are over, the oldest first, and then the days of which nothing is left."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from agl.store.postgres import rollouts, spans
from agl.store.postgres.database import Connection, Database
from agl.store.protocol import QUIET_S, Collected

_SPANS_PER_STEP: Final = 200
_SPAN_BYTES: Final = 300
"""About what a span takes up beside its body: its row and its places in the indexes."""

_NEXT = """
SELECT day, arrival, arrived_ns, rollout_id, trace_id FROM spans
WHERE (day, arrival) > (%s, %s) ORDER BY day, arrival LIMIT %s
"""

_KEYS = f"{spans.WHOLE} SELECT rollout, trace FROM whole WHERE coalesce(rollout, encode(trace, 'hex')) IS NOT NULL"

_OF_KEY = "(rollout_id = %(rollout)s OR (trace_id = %(trace)s AND rollout_id IS NULL))"
_LAST_ARRIVAL = f"SELECT coalesce(max(arrived_ns), 0) FROM spans WHERE {_OF_KEY}"
_DELETE = f"DELETE FROM spans WHERE {_OF_KEY} AND arrived_ns <= %(last_ns)s RETURNING day, size"

_OWNERS = """
SELECT rollout_id FROM spans WHERE trace_id = %(trace)s AND rollout_id IS NOT NULL
UNION
SELECT asker.rollout_id FROM spans own JOIN spans asker ON asker.asked = own.answered
WHERE own.trace_id = %(trace)s AND own.rollout_id IS NULL AND asker.rollout_id IS NOT NULL
UNION
SELECT answer.rollout_id FROM spans own JOIN spans answer ON answer.answered = own.asked
WHERE own.trace_id = %(trace)s AND own.rollout_id IS NULL AND answer.rollout_id IS NOT NULL
"""
"""Rollouts that the unnamed spans of a trace may belong to. Rather one too many: then they go the next time."""

_WITHOUT_SPANS = """
DELETE FROM rollouts
WHERE ended_ns < %s AND NOT EXISTS (SELECT 1 FROM spans WHERE spans.rollout_id = rollouts.rollout_id)
"""

_PARTITIONS = """
SELECT substring(relid::text FROM '[0-9]+$')::integer AS day FROM pg_partition_tree('span_bodies') WHERE isleaf
ORDER BY day
"""

_WITHOUT_ROW = """
DELETE FROM span_bodies body
WHERE day = %(day)s AND NOT EXISTS (SELECT 1 FROM spans WHERE day = %(day)s AND arrival = body.arrival)
"""

Key = tuple[str | None, bytes | None]


def collect(database: Database, older_than_s: float | None, max_bytes: int | None, now_ns: int) -> Collected:
    """See `Store.gc`."""
    before_ns = 0 if older_than_s is None else now_ns - int(older_than_s * 1e9)
    used = database.read(_used_bytes) if max_bytes is not None else 0
    sweep = _Sweep(database, before_ns, now_ns, used - (max_bytes or 0))
    sweep.run()
    without_spans = database.write(lambda db: _delete_without_spans(db, before_ns))
    for day in database.read(_days):
        is_past, is_holed = day < now_ns // spans.DAY_NS, day in sweep.days
        database.write(partial(_clear, day=day, is_past=is_past, is_holed=is_holed))
    return Collected(sweep.rollouts + without_spans, sweep.spans)


@dataclass(slots=True)
class _Sweep:
    """One walk over the spans by arrival; each rollout goes in a transaction of its own."""

    database: Database
    before_ns: int
    now_ns: int
    excess: int
    """Bytes that have to go."""
    rollouts: int = 0
    spans: int = 0
    days: set[int] = field(default_factory=set)
    """Days of the bodies that nothing points at any more."""
    _seen: set[str] = field(default_factory=set)

    def run(self) -> None:
        place: Sequence[int] = (0, 0)
        while found := self.database.read(partial(_next, place=place)):
            for _, _, arrived_ns, rollout_id, trace_id in found:
                if not self._is_wanted(arrived_ns):  # nor is any that arrived later
                    return
                self._visit(rollout_id or trace_id.hex(), named=rollout_id is not None)
            place = found[-1][:2]

    def _visit(self, name: str, *, named: bool) -> None:
        if name in self._seen:
            return
        self._seen.add(name)
        gone = self.database.write(partial(self._delete, name=name, named=named))
        self.spans += len(gone)
        self.rollouts += bool(gone)  # Else it stays, or went with another a moment ago.
        self.days |= {day for day, _ in gone}
        self.excess -= sum(size + _SPAN_BYTES for _, size in gone)

    def _is_wanted(self, last_ns: int) -> bool:
        return last_ns < self.before_ns or self.excess > 0

    def _delete(self, db: Connection, name: str, named: bool) -> list[tuple[Any, ...]]:
        """Delete a rollout, if it is to go; returns day and size of each of its spans."""
        keys: list[Key] = [(rollout, trace) for rollout, trace in db.execute(_KEYS, spans.keys(name))]
        own = [key for key in keys if not _owners(db, key) - {name}]
        if len(own) < len(keys) and not named:  # It goes with those who name it.
            return []
        last_ns = self._over_since(db, name, own)
        if last_ns is None or not self._is_wanted(last_ns):
            return []
        # If the machine fails it is there again, to be collected another time: no need to wait for the disk.
        db.execute("SET LOCAL synchronous_commit TO off")
        db.execute("DELETE FROM rollouts WHERE rollout_id = %s", (name,))
        # But for those that come this moment.
        return [row for key in own for row in db.execute(_DELETE, _named(key) | {"last_ns": last_ns}).fetchall()]

    def _over_since(self, db: Connection, name: str, keys: list[Key]) -> int | None:
        """When a rollout ended or was last heard of; None where it may go on."""
        last_ns = max(_last_arrival(db, key) for key in keys)
        rollout = rollouts.get(db, name)
        if rollout is not None:
            return max(last_ns, rollout.ended_ns or 0) if rollout.state.is_over else None
        return last_ns if last_ns < self.now_ns - QUIET_S * 1e9 else None


def _next(db: Connection, place: Sequence[int]) -> list[tuple[Any, ...]]:
    """The spans that arrived after `place`, which is a day and an arrival."""
    return db.execute(_NEXT, (*place, _SPANS_PER_STEP)).fetchall()


def _delete_without_spans(db: Connection, before_ns: int) -> int:
    """Delete the rollouts that are over and have no spans, and the attempts of all that are gone."""
    deleted = db.execute(_WITHOUT_SPANS, (before_ns,)).rowcount
    db.execute("DELETE FROM attempts WHERE rollout_id NOT IN (SELECT rollout_id FROM rollouts)")
    return deleted


def _owners(db: Connection, key: Key) -> set[str]:
    return set() if key[1] is None else {name for (name,) in db.execute(_OWNERS, _named(key))}


def _clear(db: Connection, day: int, is_past: bool, is_holed: bool) -> None:
    """Give back the bodies of a day that nothing points at: all at once where these are all."""
    if is_past and not _has_spans(db, day):
        # Locked before it is looked at again: a span that is being written meanwhile waits, and finds no partition.
        db.execute("LOCK TABLE ONLY span_bodies IN ACCESS EXCLUSIVE MODE")
        if not _has_spans(db, day):
            db.execute(f"DROP TABLE IF EXISTS {spans.partition(day)}".encode())
    elif is_holed:
        db.execute(_WITHOUT_ROW, {"day": day})


def _has_spans(db: Connection, day: int) -> bool:
    return db.execute("SELECT 1 FROM spans WHERE day = %s LIMIT 1", (day,)).fetchone() is not None


def _days(db: Connection) -> list[int]:
    return [day for (day,) in db.execute(_PARTITIONS)]


def _used_bytes(db: Connection) -> int:
    found = db.execute("SELECT coalesce(sum(size + %s), 0) FROM spans", (_SPAN_BYTES,)).fetchone()
    return int(found[0]) if found else 0


def _last_arrival(db: Connection, key: Key) -> int:
    found = db.execute(_LAST_ARRIVAL, _named(key)).fetchone()
    return found[0] if found else 0


def _named(key: Key) -> dict[str, Any]:
    return {"rollout": key[0], "trace": key[1]}
