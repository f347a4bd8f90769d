"""Partitions of the tables `spans` and `span_bodies`.

The partition key is (`home`, `bucket`). `home` is the rollout that a span names, else its trace id: spans that are read
together are stored together. A full bucket is closed and the next one begins, which limits the size of a partition.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from agl.store.cassandra.keyspace import Keyspace, Record
from agl.store.span_row import SpanRow

_MAX_SPANS: Final = 20_000
_MAX_BYTES: Final = 32 * 2**20
"""A process closes a bucket into which it has written so many."""
_REMEMBERED_BUCKETS: Final = 10_000

CLOSED: Final = b"\0"
"""Clustering key of a marker row in `span_bodies` for a closed bucket, found by the same query as its spans."""

_CLOSE = "UPDATE spans SET closed = true WHERE home = ? AND bucket = ?"
_CLOSE_BODIES = "INSERT INTO span_bodies (home, bucket, span) VALUES (?, ?, ?)"
_READ = (
    "SELECT closed, span, start_ns, arrived_ns, size, response_id, is_answer FROM spans WHERE home = ? AND bucket = ?"
)

Partition = tuple[str, int]
"""`home` and `bucket`."""


class Located:
    """A span of the partition key `home`."""

    __slots__ = ()

    home: str
    span: bytes
    """Trace id, then span id."""

    @property
    def trace(self) -> str:
        """Trace id in hex: `home` of the spans of the trace that name no rollout."""
        return self.span[:16].hex()

    @property
    def is_named(self) -> bool:
        """Whether the span names a rollout."""
        return self.home != self.trace


@dataclass(frozen=True, slots=True)
class IndexedSpan(Located):
    """A row of `spans`: a span without its OTLP bytes."""

    home: str
    bucket: int
    span: bytes
    start_ns: int
    arrived_ns: int
    size: int
    response_id: str | None
    """The response that it requested, or, with `is_answer`, that it returned as a gateway call without a parent."""
    is_answer: bool


class BucketFill:
    """How much this process has written into each bucket."""

    def __init__(self, max_spans: int = _MAX_SPANS, max_bytes: int = _MAX_BYTES) -> None:
        self._max_spans, self._max_bytes = max_spans, max_bytes
        self._buckets: OrderedDict[Partition, tuple[int, int]] = OrderedDict()
        self._changing = threading.Lock()

    def add(self, partition: Partition, spans: int, size: int) -> bool:
        """Count spans and bytes that were written; returns whether the bucket is full."""
        with self._changing:
            old_spans, old_size = self._buckets.pop(partition, (0, 0))
            spans, size = old_spans + spans, old_size + size
            if spans >= self._max_spans or size >= self._max_bytes:
                return True
            self._buckets[partition] = spans, size
            if len(self._buckets) > _REMEMBERED_BUCKETS:
                self._buckets.popitem(last=False)
            return False


def home_of(row: SpanRow) -> str:
    return row.trace_id.hex() if row.rollout_id is None else row.rollout_id


def read(db: Keyspace, homes: Iterable[str]) -> list[IndexedSpan]:
    """All spans of these partition keys, from all their buckets."""
    found: list[IndexedSpan] = []
    partitions = [(home, 0) for home in homes]
    while partitions:
        results = zip(partitions, db.run([(_READ, key) for key in partitions]), strict=True)
        partitions = []
        for key, rows in results:
            # A closed bucket without spans has one row, without a span.
            found.extend(_to_span(key, row) for row in rows if row[1] is not None)
            if rows and rows[0][0]:
                partitions.append((key[0], key[1] + 1))
    return found


def close(db: Keyspace, partitions: Sequence[Partition]) -> None:
    """Close these buckets: later spans go to the next bucket."""
    db.write_batches([[(_CLOSE, key), (_CLOSE_BODIES, (*key, CLOSED))] for key in partitions])


def _to_span(key: Partition, row: Record) -> IndexedSpan:
    _, span, start_ns, arrived_ns, size, response_id, is_answer = row
    return IndexedSpan(*key, span, start_ns, arrived_ns, size, response_id, bool(is_answer))
