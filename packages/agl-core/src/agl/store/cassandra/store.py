"""The store in a Cassandra keyspace."""

from collections.abc import Sequence
from typing import Final

from agl.store.cassandra import spans
from agl.store.cassandra.keyspace import Keyspace
from agl.store.cassandra.resources import CassandraResources
from agl.store.cassandra.retention import CassandraRetention
from agl.store.cassandra.rollouts import CassandraRollouts, heartbeat_known
from agl.store.cassandra.span_partition import BucketFill
from agl.store.end_notifier import EndNotifier
from agl.store.protocol import Collected, Store
from agl.store.retention import Limits
from agl.store.span_row import SpanRow, attempt_ids

_POLL_S: Final = 0.25
"""Cassandra sends no notification when another process ends a rollout."""


class CassandraStore(CassandraRollouts, CassandraResources, Store):
    """A store in the keyspace at `uri`, shared by any number of machines.

    Raises StoreError if no node answers or another program owns the keyspace. With three copies any one node may fail.

    It deviates from the protocol in two points. An `append_rows` with spans of several rollouts is not atomic: after a
    StoreError some spans may be stored, and a repetition stores the others. If two callers append the same span at the
    same moment, both may count it as new; it is stored once.
    """

    def __init__(self, uri: str) -> None:
        self._keyspace = Keyspace(uri)
        self.uri = uri
        self._fill = BucketFill()
        self._ends = EndNotifier(_POLL_S)

    def append_rows(self, rows: Sequence[SpanRow]) -> int:
        now_ns = self._keyspace.now_ns()
        heartbeat_known(self._keyspace, attempt_ids(rows), now_ns)
        return spans.insert(self._keyspace, rows, now_ns, self._fill)

    def query_rows(self, rollout_id: str) -> list[bytes]:
        return spans.query(self._keyspace, rollout_id)

    def count_spans(self) -> int:
        return spans.count(self._keyspace)

    def last_rollout_id(self) -> str | None:
        return spans.last_rollout_id(self._keyspace)

    def rollout_ids(self) -> list[str]:
        return spans.rollout_ids(self._keyspace)

    def gc(
        self, *, older_than_s: float | None = None, max_bytes: int | None = None, now_ns: int | None = None
    ) -> Collected:
        limits = Limits.of(older_than_s, max_bytes, now_ns or self._keyspace.now_ns())
        return CassandraRetention(self._keyspace, limits).collect()

    def close(self) -> None:
        self._keyspace.close()
