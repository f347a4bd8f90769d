"""The store in a Cassandra keyspace."""

from typing import Final

from agl.store.cassandra.keyspace import Keyspace
from agl.store.cassandra.resources import CassandraResources
from agl.store.cassandra.retention import CassandraRetention
from agl.store.cassandra.rollouts import CassandraRollouts
from agl.store.cassandra.span_partition import BucketFill
from agl.store.cassandra.spans import CassandraSpans
from agl.store.cassandra.traffic import CassandraTraffic
from agl.store.end_notifier import EndNotifier
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
        self._ends = EndNotifier(_POLL_S)

    def gc(
        self, *, older_than_s: float | None = None, max_bytes: int | None = None, now_ns: int | None = None
    ) -> Collected:
        limits = Limits.of(older_than_s, max_bytes, now_ns or self._keyspace.now_ns())
        return CassandraRetention(self._keyspace, limits).collect()

    def close(self) -> None:
        self._keyspace.close()
