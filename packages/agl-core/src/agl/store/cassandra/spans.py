"""Spans in Cassandra: each batch is looked up, indexed, and then written partition by partition."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agl.errors import InputError
from agl.store.cassandra import span_partition
from agl.store.cassandra.keyspace import Keyspace, Statement
from agl.store.cassandra.membership import find_owners, find_spans
from agl.store.cassandra.rollouts import heartbeat_by_span
from agl.store.cassandra.span_partition import BucketFill, IndexedSpan, Partition, home_of
from agl.store.lifecycle import SpanHeartbeats
from agl.store.mapping import read_cursor, to_cursor
from agl.store.membership import trace_id_of
from agl.store.protocol import RolloutPage
from agl.store.span_row import SpanRow, attempt_ids, checksum, verified

_MAX_SPAN_BYTES: Final = 15 * 2**20
"""A node rejects mutations of more than half a commit log segment (16 MB by default)."""
_BATCH_BYTES: Final = 32 * 1024
_BATCH_STATEMENTS: Final = 50
_SPANS_PER_LOOKUP: Final = 500
_TOKEN_RANGES: Final = 32
"""Parts of the ring that `count` counts by one request each."""

_LOOK_UP = "SELECT span FROM span_bodies WHERE home = ? AND bucket = ? AND span IN ?"
# Two statements, because Cassandra writes a tombstone for a null value.
_INSERT = "INSERT INTO spans (home, bucket, span, start_ns, arrived_ns, size) VALUES (?, ?, ?, ?, ?, ?)"
_INSERT_WITH_RESPONSE = """
INSERT INTO spans (home, bucket, span, start_ns, arrived_ns, size, response_id, is_answer)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
"""
_INSERT_BODY = "INSERT INTO span_bodies (home, bucket, span, checksum, otlp) VALUES (?, ?, ?, ?, ?)"
_INSERT_RESPONSE = """
INSERT INTO responses (response_id, is_answer, start_ns, span, home, arrived_ns) VALUES (?, ?, ?, ?, ?, ?)
"""
_INSERT_TRACE = "INSERT INTO traces (trace_id, home) VALUES (?, ?)"
_INSERT_LATEST = "INSERT INTO latest (place, named, home) VALUES (0, false, ?)"
_BODIES = "SELECT span, otlp, checksum FROM span_bodies WHERE home = ? AND bucket = ?"
_COUNT = "SELECT count(*) FROM spans WHERE token(home, bucket) > ? AND token(home, bucket) <= ?"
_LATEST = "SELECT home FROM latest WHERE place = 0 AND named = false"
_ANY = "SELECT span FROM spans WHERE home = ? AND bucket = 0 LIMIT 1"
_ALL = "SELECT home, span, arrived_ns FROM spans"


@dataclass(frozen=True, slots=True)
class _NewSpan:
    row: SpanRow
    span: bytes
    """Trace id, then span id."""
    arrived_ns: int

    @property
    def response_id(self) -> str | None:
        return self.row.asked or self.row.answered


class CassandraSpans:
    """The verbs of `Store` for spans."""

    _keyspace: Keyspace
    _heartbeats: SpanHeartbeats
    _fill: BucketFill

    def append_rows(self, rows: Sequence[SpanRow]) -> int:
        now_ns = self._keyspace.now_ns()
        heartbeat_by_span(self._keyspace, attempt_ids(rows), now_ns, self._heartbeats)
        return _insert(self._keyspace, rows, now_ns, self._fill)

    def query_rows_by_rollout(self, rollout_ids: Sequence[str]) -> dict[str, list[bytes]]:
        spans = {name: _unique(found.all()) for name, found in find_spans(self._keyspace, rollout_ids).items()}
        partitions = sorted({(span.home, span.bucket) for some in spans.values() for span in some})
        results = self._keyspace.run([(_BODIES, key) for key in partitions])
        bodies = {span: (otlp, known) for rows in results for span, otlp, known in rows}
        return {
            name: verified(
                name, ((*bodies[s.span], s.span[:16], s.span[16:], s.start_ns) for s in some if s.span in bodies)
            )
            for name, some in spans.items()
        }

    def count_spans(self) -> int:
        """Counted by the nodes, range by range. A counter column would drift: a retried increment may count twice."""
        step = 2**64 // _TOKEN_RANGES
        bounds = [-(2**63) + number * step for number in range(_TOKEN_RANGES)] + [2**63 - 1]
        results = self._keyspace.run([(_COUNT, bounds[n : n + 2]) for n in range(_TOKEN_RANGES)])
        return sum(rows[0][0] for rows in results)

    def last_rollout_id(self) -> str | None:
        latest = self._keyspace.read(_LATEST)
        if not latest:
            return None
        home = latest[0][0]
        if not self._keyspace.read(_ANY, home):  # `gc` has deleted the rollout: scan all spans.
            rows = (row for row in self._keyspace.scan(_ALL) if row[1] is not None)
            last = max(((arrived_ns, home) for home, _, arrived_ns in rows), default=None)
            if last is None:
                return None
            home = last[1]
        if trace_id_of(home) is None:
            return home
        return min(self._owners(home), default=home)

    def rollout_ids(self) -> list[str]:
        first: dict[str, int] = {}
        named: set[str] = set()
        for home, span, arrived_ns in self._keyspace.scan(_ALL):
            if span is None or arrived_ns is None:  # A closed bucket without spans.
                continue
            first[home] = min(arrived_ns, first.get(home, arrived_ns))
            if home != (trace := span[:16].hex()):
                named.add(trace)
        return sorted(first.keys() - named, key=lambda home: (first[home], home))

    def list_rollouts(self, limit: int = 50, cursor: str | None = None) -> RolloutPage:
        ids, found = self.rollout_ids(), list[str]()
        place = min(len(ids), *read_cursor(cursor, 1)) if cursor else len(ids)
        while place and len(found) < limit:
            place -= 1
            if trace_id_of(ids[place]) is None or not self._owners(ids[place]):
                found.append(ids[place])
        return RolloutPage(found, to_cursor([place]) if place else None)

    def _owners(self, home: str) -> set[str]:
        """The rollouts to which the spans of the trace `home` belong that name none."""
        return find_owners(self._keyspace, find_spans(self._keyspace, [home])[home]).get(home, set())


def check_size(row: SpanRow) -> None:
    """Raises InputError for a span that no node accepts."""
    if len(row.otlp) > _MAX_SPAN_BYTES:
        raise InputError(
            f"a span of {len(row.otlp)} bytes; a Cassandra store takes up to {_MAX_SPAN_BYTES}: shorten its content"
        )


def _insert(db: Keyspace, rows: Sequence[SpanRow], now_ns: int, fill: BucketFill) -> int:
    """Insert those of `rows` that the store does not have yet; returns how many.

    Writes the index entries of a span before the span: if that fails in between, a retry writes both again.
    """
    incoming: dict[str, dict[bytes, _NewSpan]] = defaultdict(dict)
    for place, row in enumerate(rows):
        check_size(row)
        span = row.trace_id + row.span_id
        incoming[home_of(row)].setdefault(span, _NewSpan(row, span, now_ns + place))
    partitions = _without_known(db, incoming)
    new = [span for spans in partitions.values() for span in spans]
    if not new:
        return 0
    db.write_batches(_by_replicas(db, list(_index_entries(new))))
    db.write_batches(batch for partition, spans in partitions.items() for batch in _batches(partition, spans))
    last = max(new, key=lambda span: span.arrived_ns)
    db.write_batches([[(_INSERT_LATEST, (home_of(last.row),))]])
    sizes = {key: (len(spans), sum(len(span.row.otlp) for span in spans)) for key, spans in partitions.items()}
    span_partition.close(db, [key for key, written in sizes.items() if fill.add(key, *written)])
    return len(new)


def _without_known(db: Keyspace, incoming: Mapping[str, dict[bytes, _NewSpan]]) -> dict[Partition, list[_NewSpan]]:
    """The spans that no bucket of their partition key has, by the open bucket to write them to."""
    new: dict[Partition, list[_NewSpan]] = {}
    partitions = [(home, 0) for home in incoming]
    left = {home: dict(spans) for home, spans in incoming.items()}
    while partitions:
        lookups = [(key, part) for key in partitions for part in _chunks(sorted(left[key[0]]), _SPANS_PER_LOOKUP)]
        results = db.run([(_LOOK_UP, (*key, [*part, span_partition.CLOSED])) for key, part in lookups])
        closed: dict[Partition, bool] = dict.fromkeys(partitions, False)
        for (key, _), spans in zip(lookups, results, strict=True):
            for (span,) in spans:
                closed[key] |= span == span_partition.CLOSED
                left[key[0]].pop(span, None)
        new |= {key: list(left[key[0]].values()) for key in partitions if not closed[key] and left[key[0]]}
        partitions = [(home, bucket + 1) for home, bucket in partitions if closed[home, bucket] and left[home]]
    return new


def _index_entries(spans: Iterable[_NewSpan]) -> Iterator[tuple[tuple[str | bytes, ...], Statement]]:
    """Partition key and statement of each entry in `responses` and `traces`."""
    traces: set[tuple[bytes, str]] = set()
    for span in spans:
        row, home = span.row, home_of(span.row)
        if span.response_id:
            values = (span.response_id, row.asked is None, row.start_ns, span.span, home, span.arrived_ns)
            yield (span.response_id,), (_INSERT_RESPONSE, values)
        if row.rollout_id is not None and (row.trace_id, home) not in traces:
            traces.add((row.trace_id, home))
            yield (row.trace_id,), (_INSERT_TRACE, (row.trace_id, home))


def _by_replicas(
    db: Keyspace, statements: Sequence[tuple[tuple[str | bytes, ...], Statement]]
) -> Iterator[list[Statement]]:
    """Batches of small rows of many partitions, each batch for the same nodes."""
    groups: dict[tuple[str, ...], list[Statement]] = defaultdict(list)
    for key, statement in statements:
        groups[db.replicas(key)].append(statement)
    for group in groups.values():
        yield from _chunks(group, _BATCH_STATEMENTS)


def _batches(partition: Partition, spans: Iterable[_NewSpan]) -> Iterator[list[Statement]]:
    """Statements that write the spans of a partition, in batches that a node accepts."""
    batch: list[Statement] = []
    size = 0
    for span in spans:
        row = span.row
        if batch and (size + len(row.otlp) > _BATCH_BYTES or len(batch) >= _BATCH_STATEMENTS):
            yield batch
            batch, size = [], 0
        values = (*partition, span.span, row.start_ns, span.arrived_ns, len(row.otlp))
        with_response = (_INSERT_WITH_RESPONSE, (*values, span.response_id, row.asked is None))
        batch.append(with_response if span.response_id else (_INSERT, values))
        batch.append((_INSERT_BODY, (*partition, span.span, checksum(row.otlp), row.otlp)))
        size += len(row.otlp)
    yield batch


def _unique(spans: Iterable[IndexedSpan]) -> list[IndexedSpan]:
    """In order; of a span that has two partition keys, the first."""
    found = {span.span: span for span in sorted(spans, key=_order, reverse=True)}
    return sorted(found.values(), key=_order)


def _order(span: IndexedSpan) -> tuple[int, int]:
    return span.start_ns, span.arrived_ns


def _chunks(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for first in range(0, len(items), size):
        yield list(items[first : first + size])
