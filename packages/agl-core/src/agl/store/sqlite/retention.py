"""What `gc` deletes: rollouts that are over, the oldest first, in transactions short enough to write beside."""

import sqlite3
from dataclasses import dataclass, field
from typing import Any

from agl.store.protocol import QUIET_S, Collected
from agl.store.sqlite import rollouts, spans
from agl.store.sqlite.database import Database

_SPANS_PER_STEP = 200
_PAGES_PER_STEP = 500

_NEXT = "SELECT arrival, arrived_ns, rollout_id, trace_id FROM spans WHERE arrival > ? ORDER BY arrival LIMIT ?"

_KEYS = f"{spans.WHOLE} SELECT key FROM whole WHERE key IS NOT NULL"

_OF_KEY = "(rollout_id = :key OR (trace_id = :key AND rollout_id IS NULL))"

_LAST_ARRIVAL = f"SELECT max(arrived_ns) FROM spans WHERE {_OF_KEY}"

_DELETE_ASKS = f"""
DELETE FROM asks WHERE (response_id, start_ns, trace_id, span_id)
IN (SELECT asked, start_ns, trace_id, span_id FROM spans WHERE {_OF_KEY})
"""

_DELETE = f"DELETE FROM spans WHERE {_OF_KEY}"

_OWNERS = """
SELECT rollout_id FROM spans WHERE trace_id = :key AND rollout_id IS NOT NULL
UNION
SELECT asker.rollout_id
FROM spans own JOIN asks ask ON ask.response_id = own.answered
JOIN spans asker ON (asker.trace_id, asker.span_id) = (ask.trace_id, ask.span_id)
WHERE own.trace_id = :key AND own.rollout_id IS NULL AND asker.rollout_id IS NOT NULL
UNION
SELECT answer.rollout_id FROM spans own JOIN spans answer ON answer.answered = own.asked
WHERE own.trace_id = :key AND own.rollout_id IS NULL AND answer.rollout_id IS NOT NULL
"""
"""Rollouts that the unnamed spans of a trace may belong to. Rather one too many: then they go the next time."""

_WITHOUT_SPANS = """
DELETE FROM rollouts
WHERE ended_ns < ? AND NOT EXISTS (SELECT 1 FROM spans WHERE spans.rollout_id = rollouts.rollout_id)
RETURNING rollout_id
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """What may stay: rollouts that were over after `before_ns`, in `max_bytes` or less."""

    before_ns: int
    max_bytes: int | None
    now_ns: int

    def exceeded(self, db: sqlite3.Connection, last_ns: int) -> bool:
        """Whether a rollout last heard of at `last_ns` has to go."""
        return last_ns < self.before_ns or (self.max_bytes is not None and used_bytes(db) > self.max_bytes)


def collect(database: Database, limits: Limits) -> Collected:
    """See `Store.gc`: a walk over the spans by arrival, some in each transaction."""
    while database.write(spans.sort_asks):
        pass
    place, collected, seen = 0, Collected(), set[str]()
    while place is not None:
        step = database.write(lambda db, place=place: _Step(limits, frozenset(seen)).run(db, place))
        seen.update(step.looked_at)
        collected, place = _sum(collected, step.collected), step.place
    without_spans = database.write(lambda db: _finish(db, limits.before_ns))
    while database.write(_give_back_pages):
        pass
    return _sum(collected, Collected(rollouts=without_spans))


@dataclass(slots=True)
class _Step:
    """Some spans further."""

    limits: Limits
    seen: frozenset[str]
    looked_at: set[str] = field(default_factory=set)
    collected: Collected = field(default_factory=Collected)
    place: int | None = None
    """Arrival of the last span looked at; None where none that follows is to be collected."""

    def run(self, db: sqlite3.Connection, after: int) -> "_Step":
        spans.sort_asks(db)
        for arrival, arrived_ns, rollout_id, trace_id in db.execute(_NEXT, (after, _SPANS_PER_STEP)).fetchall():
            self.place = arrival
            name = rollout_id or trace_id.hex()
            if name in self.seen or name in self.looked_at:
                continue
            if not self.limits.exceeded(db, arrived_ns):
                self.place = None
                break
            self.looked_at.add(name)
            self._consider(db, name, named=rollout_id is not None)
        return self

    def _consider(self, db: sqlite3.Connection, name: str, *, named: bool) -> None:
        keys = [key for (key,) in db.execute(_KEYS, spans.keys(name))]
        shared = {key for key in keys if isinstance(key, bytes) and _owners(db, key) - {name}}
        if shared and not named:  # It goes with those who name it.
            return
        own = [key for key in keys if key not in shared]
        last_ns = self._over_since(db, name, own)
        if last_ns is not None and self.limits.exceeded(db, last_ns):
            deleted = sum(_delete(db, key) for key in own)
            db.execute("DELETE FROM rollouts WHERE rollout_id = ?", (name,))
            # Without spans it went with another a moment ago.
            self.collected = _sum(self.collected, Collected(rollouts=int(deleted > 0), spans=deleted))

    def _over_since(self, db: sqlite3.Connection, name: str, keys: list[Any]) -> int | None:
        """When a rollout ended or was last heard of; None where it may go on."""
        last_ns = max(db.execute(_LAST_ARRIVAL, {"key": key}).fetchone()[0] or 0 for key in keys)
        rollout = rollouts.get(db, name)
        if rollout is None:
            return last_ns if last_ns < self.limits.now_ns - QUIET_S * 1e9 else None
        return max(last_ns, rollout.ended_ns or 0) if rollout.state.is_over else None


def used_bytes(db: sqlite3.Connection) -> int:
    """What the file holds, without the pages that are free to be filled again."""
    pages, free, size = (
        db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


def _owners(db: sqlite3.Connection, trace: bytes) -> set[str]:
    return {name for (name,) in db.execute(_OWNERS, {"key": trace})}


def _delete(db: sqlite3.Connection, key: str | bytes) -> int:
    db.execute(_DELETE_ASKS, {"key": key})
    return db.execute(_DELETE, {"key": key}).rowcount


def _finish(db: sqlite3.Connection, before_ns: int) -> int:
    """Delete the rollouts that have no spans, and the attempts of all that are gone; returns how many had none."""
    without_spans = db.execute(_WITHOUT_SPANS, (before_ns,)).fetchall()
    db.execute("DELETE FROM attempts WHERE rollout_id NOT IN (SELECT rollout_id FROM rollouts)")
    return len(without_spans)


def _give_back_pages(db: sqlite3.Connection) -> bool:
    """Shorten the file by some of its free pages; returns whether there are more. An old file keeps them."""
    before = _free_pages(db)
    db.execute(f"PRAGMA incremental_vacuum({_PAGES_PER_STEP})").fetchall()
    return 0 < _free_pages(db) < before


def _free_pages(db: sqlite3.Connection) -> int:
    return db.execute("PRAGMA freelist_count").fetchone()[0]


def _sum(first: Collected, second: Collected) -> Collected:
    return Collected(first.rollouts + second.rollouts, first.spans + second.spans)
