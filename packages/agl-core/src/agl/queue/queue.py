"""The queue: a Redis stream that one consumer group reads, and a counter of its spans.

An entry holds spans as one OTLP request. It leaves the stream once its spans are in the store, so the stream holds all
spans that are not stored yet, including those that a writer is working on.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from redis.exceptions import ResponseError

from agl.config.queue import QueueConfig
from agl.config.section import DEFAULT_PROJECT
from agl.errors import QueueError
from agl.queue.connection import BLOCK_MS, connect, node_of, redis_errors
from agl.queue.durability import check_durability
from agl.secret_url import SecretUrl
from agl.store.span_row import SpanRow

_GROUP: Final = "writers"
_ENTRY_BYTES: Final = 2**20
"""Maximum size of an entry with several spans, which limits the memory of a writer."""
MAX_ENTRIES: Final = 64
"""Maximum number of entries that `take`, `take_unfinished` and `claim` return."""

# Scripts change the stream and the counter atomically, also in the append-only file.
_APPEND: Final = """
if tonumber(redis.call('GET', KEYS[2]) or '0') >= tonumber(ARGV[1]) then return -1 end
local spans = 0
for i = 3, #ARGV, 2 do
  redis.call('XADD', KEYS[1], '*', 'project', ARGV[2], 'spans', ARGV[i], 'otlp', ARGV[i + 1])
  spans = spans + ARGV[i]
end
return redis.call('INCRBY', KEYS[2], spans)
"""
# XACK first: if Redis is out of memory it rejects DECRBY, unless the script has already written.
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
    """`spans` spans of a project as one OTLP request; `entry_id` is the id in the stream."""

    entry_id: bytes
    project: str
    spans: int
    otlp: bytes


class SpanQueue:
    """The queue `config.name` in the Redis server or Redis Cluster at `uri`. Thread-safe; methods raise QueueError.

    In a cluster all keys of a queue are in one hash slot, and so on one node.
    """

    def __init__(self, uri: str, config: QueueConfig | None = None) -> None:
        self.uri = SecretUrl(uri)
        self._config = config or QueueConfig()
        self._stream = f"{{{self._config.name}}}:spans"
        self._counter = f"{self._stream}:length"
        self._refused = f"{self._stream}:refused"
        self._redis: Any = connect(self.uri)
        self._make_group()

    def check_durability(self) -> None:
        """Raises QueueError if Redis may lose more than the configuration allows; see `durability`."""
        with redis_errors():
            check_durability(node_of(self._redis, self._stream), self._config.appendfsync)

    def append_rows(self, rows: Sequence[SpanRow], project: str = DEFAULT_PROJECT) -> int:
        """Append all spans or none, for `project`; returns their number, whether or not the store has them already."""
        if not rows:
            return 0
        entries = itertools.chain.from_iterable(_to_entries(rows))
        if self._run(_APPEND, self._config.hard_limit, project, *entries) < 0:
            raise QueueError(f"{self._config.hard_limit} spans wait for the store, the limit of the queue; retry")
        return len(rows)

    def of_project(self, project: str) -> "ProjectQueue":
        """`append_rows` for `project`."""
        return ProjectQueue(self, project)

    def take(self, consumer: str) -> list[Entry]:
        """Assign new entries to `consumer`, which moves and finishes them; waits half a second for the first."""
        return self._read(consumer, ">")

    def take_unfinished(self, consumer: str) -> list[Entry]:
        """The first entries that are assigned to `consumer` and not finished."""
        return self._read(consumer, "0")

    def claim(self, consumer: str) -> list[Entry]:
        """Assign entries to `consumer` that other consumers took `claim_after_s` ago and have not finished."""
        idle_ms = round(self._config.claim_after_s * 1000)
        with redis_errors():
            _, entries, *_ = self._redis.xautoclaim(self._stream, _GROUP, consumer, idle_ms, "0-0", count=MAX_ENTRIES)
        return _entries(entries)

    def finish(self, entries: Sequence[Entry]) -> None:
        """Delete entries whose spans are in the store. Entries that are deleted already are ignored."""
        arguments = itertools.chain.from_iterable((entry.entry_id, entry.spans) for entry in entries)
        self._run(_FINISH, _GROUP, *arguments)

    def set_aside(self, entry: Entry, reason: str) -> None:
        """Move an entry that can never be stored to the stream `...:refused`, with the reason."""
        fields = {"project": entry.project, "spans": entry.spans, "otlp": entry.otlp, "reason": reason}
        with redis_errors():
            self._redis.xadd(self._refused, fields)
        self.finish([entry])

    def length(self) -> int:
        """Number of acknowledged spans that are not known to be in the store."""
        with redis_errors():
            return int(self._redis.get(self._counter) or 0)

    def close(self) -> None:
        self._redis.close()

    def _run(self, script: str, *arguments: Any) -> int:
        with redis_errors():
            return self._redis.eval(script, 2, self._stream, self._counter, *arguments)

    def _read(self, consumer: str, after: str) -> list[Entry]:
        streams = {self._stream: after}
        with redis_errors():
            try:
                found = self._redis.xreadgroup(_GROUP, consumer, streams, count=MAX_ENTRIES, block=BLOCK_MS)
            except ResponseError as error:
                if not str(error).startswith("NOGROUP"):
                    raise
                self._make_group()  # Another program has deleted the keys.
                return []
        return _entries(found[0][1]) if found else []

    def _make_group(self) -> None:
        with redis_errors():
            try:
                self._redis.xgroup_create(self._stream, _GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise


@dataclass(frozen=True, slots=True)
class ProjectQueue:
    """Where spans of one project are appended."""

    queue: SpanQueue
    project: str

    def append_rows(self, rows: Sequence[SpanRow]) -> int:
        return self.queue.append_rows(rows, self.project)


def _to_entries(rows: Sequence[SpanRow]) -> Iterator[tuple[int, bytes]]:
    """Split the spans into entries of about `_ENTRY_BYTES` at most; yields number of spans and OTLP request."""
    requests: list[bytes] = []
    size = 0
    for row in rows:
        if requests and size + len(row.otlp) > _ENTRY_BYTES:
            yield len(requests), b"".join(requests)
            requests, size = [], 0
        requests.append(row.otlp)
        size += len(row.otlp)
    yield len(requests), b"".join(requests)


def _entries(found: Sequence[tuple[bytes, dict[bytes, bytes] | None]]) -> list[Entry]:
    """Entries from a reply of Redis. An entry that is deleted from the stream has no fields, and no spans.

    One that was queued before there were projects names none.
    """
    return [
        Entry(
            entry_id,
            fields.get(b"project", DEFAULT_PROJECT.encode()).decode(),
            int(fields.get(b"spans", 0)),
            fields.get(b"otlp", b""),
        )
        for entry_id, fields in ((entry_id, fields or {}) for entry_id, fields in found)
    ]
