"""Spans in Cassandra: looked up, indexed and then written, each home as batches of one partition."""

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agl.errors import InputError
from agl.store.cassandra import home
from agl.store.cassandra.database import Database, Statement
from agl.store.cassandra.membership import members
from agl.store.span_row import SpanRow

Partition = tuple[str, int]

_LONGEST_BODY: Final = 15 * 2**20
"""Bytes: a node refuses mutations of more than half a segment of its commit log, 16 MB unless it was told otherwise."""
_BATCH_BYTES: Final = 32 * 1024
_BATCH_STATEMENTS: Final = 50
_LOOKED_UP_AT_ONCE: Final = 500
_REMEMBERED: Final = 10_000
"""Homes whose filling a process remembers."""
_RANGES: Final = 32
"""Parts of the ring that are counted by a request each."""

_LOOK_UP = "SELECT span FROM span_bodies WHERE home = ? AND bucket = ? AND span IN ?"
# Two, for a value that is null is written as a tombstone.
_INSERT = "INSERT INTO spans (home, bucket, span, start_ns, arrived_ns, size) VALUES (?, ?, ?, ?, ?, ?)"
_INSERT_TELLING = """
INSERT INTO spans (home, bucket, span, start_ns, arrived_ns, size, response_id, is_answer)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
"""
_INSERT_BODY = "INSERT INTO span_bodies (home, bucket, span, otlp) VALUES (?, ?, ?, ?)"
_INSERT_RESPONSE = "INSERT INTO responses (response_id, is_answer, start_ns, span, home) VALUES (?, ?, ?, ?, ?)"
_INSERT_TRACE = "INSERT INTO traces (trace_id, home) VALUES (?, ?)"
_INSERT_LATEST = "INSERT INTO latest (place, named, home) VALUES (0, ?, ?)"
_BODIES = "SELECT span, otlp FROM span_bodies WHERE home = ? AND bucket = ?"
_COUNT = "SELECT count(*) FROM spans WHERE token(home, bucket) > ? AND token(home, bucket) <= ?"
_ANY = "SELECT span FROM spans WHERE home = ? AND bucket = 0 LIMIT 1"
_NEWEST = "SELECT home, span, arrived_ns FROM spans"


class Filling:
    """How much this process has put into buckets, to close those that are full."""

    def __init__(self, most_spans: int = home.MOST_SPANS, most_bytes: int = home.MOST_BYTES) -> None:
        self._most_spans, self._most_bytes = most_spans, most_bytes
        self._buckets: OrderedDict[Partition, tuple[int, int]] = OrderedDict()
        self._changing = threading.Lock()

    def add(self, partition: Partition, spans: int, size: int) -> bool:
        """Whether the bucket is full now."""
        with self._changing:
            had_spans, had_bytes = self._buckets.pop(partition, (0, 0))
            spans, size = had_spans + spans, had_bytes + size
            if spans >= self._most_spans or size >= self._most_bytes:
                return True
            self._buckets[partition] = spans, size
            if len(self._buckets) > _REMEMBERED:
                self._buckets.popitem(last=False)
            return False


def insert(db: Database, rows: Sequence[SpanRow], now_ns: int, filling: Filling) -> int:
    """Keep those of `rows` that are not there yet; returns how many were new.

    What finds a span is written before the span: if that comes to nothing, the same rows are looked for again.
    """
    incoming: dict[str, dict[bytes, _Incoming]] = defaultdict(dict)
    for place, row in enumerate(rows):
        if len(row.otlp) > _LONGEST_BODY:
            raise InputError(f"a span of {len(row.otlp)} bytes; a Cassandra store keeps up to {_LONGEST_BODY}")
        span = row.trace_id + row.span_id
        incoming[home.home_of(row)].setdefault(span, _Incoming(row, span, now_ns + place))
    fresh = _leave_known(db, incoming)
    new = [span for spans in fresh.values() for span in spans]
    if not new:
        return 0
    db.write_batches(_by_replicas(db, list(_index(new))))
    db.write_batches(batch for partition, spans in fresh.items() for batch in _batches(partition, spans))
    db.write_batches([_latest(new)])
    filled = [key for key, spans in fresh.items() if filling.add(key, len(spans), sum(len(s.row.otlp) for s in spans))]
    home.close(db, filled)
    return len(new)


@dataclass(frozen=True, slots=True)
class _Incoming:
    row: SpanRow
    span: bytes
    arrived_ns: int


def _leave_known(db: Database, incoming: Mapping[str, dict[bytes, _Incoming]]) -> dict[Partition, list[_Incoming]]:
    """Those that no bucket of their home has, by the bucket that is to take them."""
    fresh: dict[Partition, list[_Incoming]] = {}
    looking = [(name, 0) for name in incoming]
    rest = {name: dict(spans) for name, spans in incoming.items()}
    while looking:
        questions = [(key, part) for key in looking for part in _cut(sorted(rest[key[0]]), _LOOKED_UP_AT_ONCE)]
        found = db.run([(_LOOK_UP, (*key, [*part, home.CLOSED])) for key, part in questions])
        closed: dict[Partition, bool] = dict.fromkeys(looking, False)
        for (key, _), spans in zip(questions, found, strict=True):
            for (span,) in spans:
                closed[key] |= span == home.CLOSED
                rest[key[0]].pop(span, None)
        fresh |= {key: list(rest[key[0]].values()) for key in looking if not closed[key] and rest[key[0]]}
        looking = [(name, bucket + 1) for name, bucket in looking if closed[name, bucket] and rest[name]]
    return fresh


def _index(spans: Iterable[_Incoming]) -> Iterator[tuple[tuple[str | bytes, ...], Statement]]:
    """Partition key and statement of what finds spans by another than their home."""
    traces: set[tuple[bytes, str]] = set()
    for span in spans:
        row, name = span.row, home.home_of(span.row)
        response_id = row.asked or row.answered
        if response_id:
            values = (response_id, row.asked is None, row.start_ns, span.span, name)
            yield (response_id,), (_INSERT_RESPONSE, values)
        if row.rollout_id is not None and (row.trace_id, name) not in traces:
            traces.add((row.trace_id, name))
            yield (row.trace_id,), (_INSERT_TRACE, (row.trace_id, name))


def _by_replicas(
    db: Database, statements: Sequence[tuple[tuple[str | bytes, ...], Statement]]
) -> Iterator[list[Statement]]:
    """Rows of a few bytes, each of its own partition: those of the same nodes share a request."""
    groups: dict[tuple[str, ...], list[Statement]] = defaultdict(list)
    for key, statement in statements:
        groups[db.replicas(key)].append(statement)
    for group in groups.values():
        yield from _cut(group, _BATCH_STATEMENTS)


def _batches(partition: Partition, spans: Iterable[_Incoming]) -> Iterator[list[Statement]]:
    """What writes the spans of a partition, in parts that a node takes."""
    batch: list[Statement] = []
    size = 0
    for span in spans:
        row = span.row
        if batch and (size + len(row.otlp) > _BATCH_BYTES or len(batch) >= _BATCH_STATEMENTS):
            yield batch
            batch, size = [], 0
        found_by = (*partition, span.span, row.start_ns, span.arrived_ns, len(row.otlp))
        response_id = row.asked or row.answered
        telling = (_INSERT_TELLING, (*found_by, response_id, row.asked is None))
        batch.append(telling if response_id else (_INSERT, found_by))
        batch.append((_INSERT_BODY, (*partition, span.span, row.otlp)))
        size += len(row.otlp)
    yield batch


def _latest(spans: Iterable[_Incoming]) -> list[Statement]:
    latest: dict[bool, str] = {}
    for span in sorted(spans, key=lambda span: span.arrived_ns):
        latest[False] = home.home_of(span.row)
        if span.row.rollout_id is not None:
            latest[True] = home.home_of(span.row)
    return [(_INSERT_LATEST, (is_named, name)) for is_named, name in latest.items()]


def query(db: Database, rollout_id: str) -> list[bytes]:
    found = {span.span: span for span in sorted(members(db, rollout_id).all(), key=_order, reverse=True)}
    partitions = sorted({(span.home, span.bucket) for span in found.values()})
    bodies = {span: body for rows in db.run([(_BODIES, key) for key in partitions]) for span, body in rows}
    return [bodies[span.span] for span in sorted(found.values(), key=_order) if span.span in bodies]


def count(db: Database) -> int:
    """Counted by the nodes, range by range: a counter would drift where a write is tried again."""
    step = 2**64 // _RANGES
    bounds = [-(2**63) + number * step for number in range(_RANGES)] + [2**63 - 1]
    return sum(rows[0][0] for rows in db.run([(_COUNT, bounds[n : n + 2]) for n in range(_RANGES)]))


def last_rollout_id(db: Database) -> str | None:
    latest = dict(db.read("SELECT named, home FROM latest WHERE place = 0"))
    for name in (latest.get(True), latest.get(False)):
        if name is not None and db.read(_ANY, name):
            return name
    return _look_for_last(db) if latest else None


def _look_for_last(db: Database) -> str | None:
    """Among all spans: what was written down as the last has been collected."""
    spans = (row for row in db.scan(_NEWEST) if row[1] is not None)
    last = max(((name != span[:16].hex(), arrived_ns, name) for name, span, arrived_ns in spans), default=None)
    return last[2] if last else None


def rollout_ids(db: Database) -> list[str]:
    first: dict[str, int] = {}
    named: set[str] = set()
    for name, span, arrived_ns in db.scan(_NEWEST):
        if span is None or arrived_ns is None:  # a bucket that is closed and empty
            continue
        first[name] = min(arrived_ns, first.get(name, arrived_ns))
        if name != (trace := span[:16].hex()):
            named.add(trace)
    return sorted(first.keys() - named, key=lambda name: (first[name], name))


def attempt_ids(rows: Iterable[SpanRow]) -> list[str]:
    """Attempts that the rows name."""
    return sorted({row.attempt_id for row in rows if row.attempt_id})


def _order(span: home.Placed) -> tuple[int, int]:
    return span.start_ns, span.arrived_ns


def _cut(items: Sequence[Any], most: int) -> Iterator[list[Any]]:
    for first in range(0, len(items), most):
        yield list(items[first : first + most])
