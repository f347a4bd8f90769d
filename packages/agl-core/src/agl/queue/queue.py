"""The queue: a Redis stream, read by one consumer group, beside a counter of its spans.

An entry holds spans of one request, as one OTLP request. It leaves the stream only when its spans are in the store:
so the stream is what is not there yet, whoever works on it.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from redis.exceptions import ResponseError

from agl.config import QueueConfig
from agl.errors import QueueError
from agl.queue.connection import BLOCK_MS, address, connect, node_of, speaking
from agl.queue.durability import check_durability
from agl.store.span_row import SpanRow

_GROUP: Final = "writers"
_ENTRY_BYTES: Final = 2**20
"""An entry takes spans up to this size, so that a writer knows how much it holds."""
ENTRIES_AT_ONCE: Final = 64
"""What `take` and its like return at most."""

# Scripts: a stream and its counter change together, in the append-only file as well.
_APPEND: Final = """
if tonumber(redis.call('GET', KEYS[2]) or '0') >= tonumber(ARGV[1]) then return -1 end
local spans = 0
for i = 2, #ARGV, 2 do
  redis.call('XADD', KEYS[1], '*', 'spans', ARGV[i], 'otlp', ARGV[i + 1])
  spans = spans + ARGV[i]
end
return redis.call('INCRBY', KEYS[2], spans)
"""
# XACK first: a Redis that is out of memory refuses DECRBY unless the script has written something before.
_FINISH: Final = """
local spans = 0
for i = 2, #ARGV, 2 do
  redis.call('XACK', KEYS[1], ARGV[1], ARGV[i])
  spans = spans + redis.call('XDEL', KEYS[1], ARGV[i]) * ARGV[i + 1]
end
return redis.call('DECRBY', KEYS[2], spans)
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """`spans` spans as one OTLP request; `entry_id` is the stream's."""

    entry_id: bytes
    spans: int
    otlp: bytes


class SpanQueue:
    """The queue `config.name` in the Redis, or Redis Cluster, at `uri`. Thread-safe; every verb raises QueueError.

    In a cluster all keys of a queue are in one slot, and so on one node.
    """

    def __init__(self, uri: str, config: QueueConfig | None = None) -> None:
        self.uri = uri
        self.address = address(uri)
        self._config = config or QueueConfig()
        self._stream = f"{{{self._config.name}}}:spans"
        self._counter = f"{self._stream}:length"
        self._refused = f"{self._stream}:refused"
        self._redis: Any = connect(uri)
        self._make_group()

    def check_durability(self) -> None:
        """Raises QueueError where Redis would lose more than the configuration allows; see `durability`."""
        with speaking():
            check_durability(node_of(self._redis, self._stream), self._config.appendfsync)

    def append_rows(self, rows: Sequence[SpanRow]) -> int:
        """Keep spans until a writer has moved them; all or none. Returns how many, whether or not they are new."""
        if not rows:
            return 0
        arguments = itertools.chain.from_iterable(_cut(rows))
        if self._run(_APPEND, self._config.hard_limit, *arguments) < 0:
            raise QueueError(f"{self._config.hard_limit} spans wait for the store, which is the limit of the queue")
        return len(rows)

    def take(self, consumer: str) -> list[Entry]:
        """Entries that nobody has taken, for `consumer` to move and `finish`; waits half a second for the first."""
        return self._read(consumer, ">")

    def take_again(self, consumer: str) -> list[Entry]:
        """The first entries that `consumer` has taken and not finished."""
        return self._read(consumer, "0")

    def claim(self, consumer: str) -> list[Entry]:
        """Take over entries that others took `claim_after_s` ago and did not finish."""
        idle_ms = round(self._config.claim_after_s * 1000)
        with speaking():
            _, entries, *_ = self._redis.xautoclaim(
                self._stream, _GROUP, consumer, idle_ms, "0-0", count=ENTRIES_AT_ONCE
            )
        return _entries(entries)

    def finish(self, entries: Sequence[Entry]) -> None:
        """Forget entries whose spans are in the store; those that are gone already do not matter."""
        arguments = itertools.chain.from_iterable((entry.entry_id, entry.spans) for entry in entries)
        self._run(_FINISH, _GROUP, *arguments)

    def set_aside(self, entry: Entry, reason: str) -> None:
        """Take an entry that can never be stored out of the way, to the stream `...:refused`, with the reason."""
        fields = {"spans": entry.spans, "otlp": entry.otlp, "reason": reason}
        with speaking():
            self._redis.xadd(self._refused, fields)
        self.finish([entry])

    def length(self) -> int:
        """Spans that are acknowledged and not known to be in the store."""
        with speaking():
            return int(self._redis.get(self._counter) or 0)

    def close(self) -> None:
        self._redis.close()

    def _run(self, script: str, *arguments: Any) -> int:
        with speaking():
            return self._redis.eval(script, 2, self._stream, self._counter, *arguments)

    def _read(self, consumer: str, after: str) -> list[Entry]:
        with speaking():
            try:
                found = self._redis.xreadgroup(
                    _GROUP, consumer, {self._stream: after}, count=ENTRIES_AT_ONCE, block=BLOCK_MS
                )
            except ResponseError as error:
                if not str(error).startswith("NOGROUP"):
                    raise
                self._make_group()  # Somebody has emptied this Redis.
                return []
        return _entries(found[0][1]) if found else []

    def _make_group(self) -> None:
        with speaking():
            try:
                self._redis.xgroup_create(self._stream, _GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise


def _cut(rows: Sequence[SpanRow]) -> Iterator[tuple[int, bytes]]:
    """Numbers of spans, and these as one OTLP request, each of about `_ENTRY_BYTES` at most."""
    pieces: list[bytes] = []
    size = 0
    for row in rows:
        if pieces and size + len(row.otlp) > _ENTRY_BYTES:
            yield len(pieces), b"".join(pieces)
            pieces, size = [], 0
        pieces.append(row.otlp)
        size += len(row.otlp)
    yield len(pieces), b"".join(pieces)


def _entries(found: Sequence[tuple[bytes, dict[bytes, bytes] | None]]) -> list[Entry]:
    """Of what was read; an entry that is gone from the stream has no fields, and no spans."""
    return [
        Entry(entry_id, int(fields[b"spans"]), fields[b"otlp"]) if fields else Entry(entry_id, 0, b"")
        for entry_id, fields in found
    ]
