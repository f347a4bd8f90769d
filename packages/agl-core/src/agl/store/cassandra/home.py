"""Homes: where spans lie. That of a span is the rollout that it names, else its trace, so that what is read together
lies together; once a bucket of a home is full the next is begun, so that no partition grows without end.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from agl.store.cassandra.database import Database, Row
from agl.store.span_row import SpanRow

MOST_SPANS: Final = 20_000
MOST_BYTES: Final = 32 * 2**20
"""A bucket into which one process has put so many is closed."""

CLOSED: Final = b"\0"
"""Stands in `span_bodies` beside the spans of a closed bucket, to be found by whoever looks some of them up."""

_CLOSE = "UPDATE spans SET closed = true WHERE home = ? AND bucket = ?"
_CLOSE_BODIES = "INSERT INTO span_bodies (home, bucket, span) VALUES (?, ?, ?)"
_READ = (
    "SELECT closed, span, start_ns, arrived_ns, size, response_id, is_answer FROM spans WHERE home = ? AND bucket = ?"
)


@dataclass(frozen=True, slots=True)
class Placed:
    """A span in its home."""

    home: str
    bucket: int
    span: bytes
    """Trace id, then span id."""
    start_ns: int
    arrived_ns: int
    size: int
    response_id: str | None
    """Of the answer that it asked for, or, with `is_answer`, that it gave as a gateway's call without a parent."""
    is_answer: bool

    @property
    def trace(self) -> str:
        """Home of the spans of its trace that name no rollout."""
        return self.span[:16].hex()

    @property
    def is_named(self) -> bool:
        return self.home != self.trace


def home_of(row: SpanRow) -> str:
    return row.trace_id.hex() if row.rollout_id is None else row.rollout_id


def read(db: Database, homes: Iterable[str]) -> list[Placed]:
    """All spans of these homes."""
    found: list[Placed] = []
    looking = [(home, 0) for home in homes]
    while looking:
        partitions = zip(looking, db.run([(_READ, key) for key in looking]), strict=True)
        looking = []
        for key, rows in partitions:
            # A partition that is closed and empty has a row of its own.
            found.extend(_placed(key, row) for row in rows if row[1] is not None)
            if rows and rows[0][0]:
                looking.append((key[0], key[1] + 1))
    return found


def close(db: Database, partitions: Sequence[tuple[str, int]]) -> None:
    """Let the next spans of these homes go to the next bucket."""
    db.write_batches([[(_CLOSE, key), (_CLOSE_BODIES, (*key, CLOSED))] for key in partitions])


def _placed(key: tuple[str, int], row: Row) -> Placed:
    _, span, start_ns, arrived_ns, size, response_id, is_answer = row
    return Placed(*key, span, start_ns, arrived_ns, size, response_id, bool(is_answer))
