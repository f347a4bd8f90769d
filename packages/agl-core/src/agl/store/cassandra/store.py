"""The store in a Cassandra keyspace."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from agl.store.cassandra import partition, resources
from agl.store.cassandra.keyspace import Keyspace
from agl.store.cassandra.partition import DamagedRow
from agl.store.cassandra.resources import CassandraResources
from agl.store.cassandra.retention import CassandraRetention, delete_spans
from agl.store.cassandra.rollouts import CassandraRollouts
from agl.store.cassandra.span_partition import BucketFill
from agl.store.cassandra.spans import CassandraSpans
from agl.store.cassandra.traffic import CassandraTraffic
from agl.store.end_notifier import EndNotifier
from agl.store.lifecycle import SpanHeartbeats
from agl.store.protocol import Collected, Store
from agl.store.retention import Limits

_POLL_S: Final = 0.25
"""Cassandra sends no notification when another process ends a rollout."""


class CassandraStore(CassandraSpans, CassandraRollouts, CassandraResources, CassandraTraffic, Store):
    """A store in the keyspace at `uri`, shared by any number of machines.

    Raises StoreError if no node answers or another program owns the keyspace. With three copies any one node may fail.

    It deviates from the protocol in two points. An `append_rows` with spans of several rollouts is not atomic: after a
    StoreError some spans may be stored, and a repetition stores the others. If two callers append the same span at the
    same moment, both may count it as new; it is stored once.
    """

    def __init__(self, uri: str) -> None:
        self._keyspace = Keyspace(uri)
        self.uri = self._keyspace.name
        self._fill = BucketFill()
        self._heartbeats = SpanHeartbeats()
        self._ends = EndNotifier(_POLL_S)

    def damaged_rows(self) -> list[str]:
        return [damaged.finding for damaged in self._damaged()]

    def delete_spans(self, rollout_id: str, damaged: Sequence[tuple[bytes, bytes]]) -> None:
        """See `agl.store.repair`."""
        delete_spans(self._keyspace, rollout_id, {trace + span for trace, span in damaged})

    def delete_damaged_rows(self, keep: Callable[[str, Sequence[Any]], None]) -> None:
        """See `agl.store.repair`."""
        for damaged in [*self._damaged()]:
            keep(damaged.finding, damaged.row)
            self._keyspace.run([damaged.delete])

    def _damaged(self) -> Iterator[DamagedRow]:
        yield from partition.damaged(self._keyspace)
        yield from resources.damaged(self._keyspace)

    def gc(
        self, *, older_than_s: float | None = None, max_bytes: int | None = None, now_ns: int | None = None
    ) -> Collected:
        limits = Limits.of(older_than_s, max_bytes, now_ns or self._keyspace.now_ns())
        return CassandraRetention(self._keyspace, limits).collect()

    def close(self) -> None:
        self._keyspace.close()
