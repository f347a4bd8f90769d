"""The verbs of `agl.store.protocol` on Cassandra, by the functions beside this file."""

from collections.abc import Mapping, Sequence
from typing import Final

from agl.store import columns
from agl.store.cassandra import partition, resources, retention, spans
from agl.store.cassandra import rollouts as rollout_rows
from agl.store.cassandra.database import Database
from agl.store.protocol import Collected, Resource, Store
from agl.store.rollout import Attempt, Rollout
from agl.store.span_row import SpanRow
from agl.store.states import AttemptState, RolloutState
from agl.store.waiting import Endings

_LOOK_EVERY_S: Final = 0.25
"""How long an end in another process may go unnoticed: Cassandra tells nobody."""


class CassandraStore(Store):
    """A store in the keyspace at `uri`, shared by any number of machines.

    Raises StoreError where no node answers or the keyspace is not ours. With three copies any one node may be away.

    It keeps less than the protocol asks for in two points. Spans of one `append_rows` that are of several rollouts
    are not kept all or none: after a StoreError some may be there, and the others are kept when it is repeated. Who
    appends a span that another appends at the same moment may both be told that it was new; it is there once.
    """

    def __init__(self, uri: str) -> None:
        self._database = Database(uri)
        self.uri = uri
        self._filling = spans.Filling()
        self._endings = Endings(_LOOK_EVERY_S)

    def append_rows(self, rows: Sequence[SpanRow]) -> int:
        now_ns = self._database.now_ns()
        rollout_rows.beat_by_spans(self._database, spans.attempt_ids(rows), now_ns)
        return spans.insert(self._database, rows, now_ns, self._filling)

    def query_rows(self, rollout_id: str) -> list[bytes]:
        return spans.query(self._database, rollout_id)

    def count_spans(self) -> int:
        return spans.count(self._database)

    def last_rollout_id(self) -> str | None:
        return spans.last_rollout_id(self._database)

    def rollout_ids(self) -> list[str]:
        return spans.rollout_ids(self._database)

    def enqueue_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        rows = [columns.to_row(rollout) for rollout in rollouts]
        rollout_rows.enqueue(self._database, rows, self._database.now_ns())

    def lease_rollout(self, worker_id: str, rollout_id: str | None = None) -> tuple[Rollout, Attempt] | None:
        return rollout_rows.lease(self._database, worker_id, rollout_id, self._database.now_ns())

    def heartbeat(self, attempt_ids: Sequence[str]) -> list[str]:
        return rollout_rows.heartbeat(self._database, attempt_ids, self._database.now_ns())

    def finish_attempt(self, attempt_id: str, state: AttemptState, error: str | None = None) -> Rollout:
        rollout = rollout_rows.finish(self._database, attempt_id, state, error, self._database.now_ns())
        self._endings.announce()
        return rollout

    def cancel_rollouts(self, rollout_ids: Sequence[str]) -> None:
        rollout_rows.cancel(self._database, rollout_ids, self._database.now_ns())
        self._endings.announce()

    def end_overdue_attempts(self, now_ns: int | None = None) -> list[Attempt]:
        ended = rollout_rows.end_overdue(self._database, now_ns or self._database.now_ns())
        self._endings.announce()
        return ended

    def wait_for_rollouts(self, rollout_ids: Sequence[str], timeout_s: float | None = None) -> list[Rollout]:
        over: dict[str, Rollout] = {}

        def read() -> list[Rollout]:
            left = [rollout_id for rollout_id in rollout_ids if rollout_id not in over]
            found = {kept.rollout.rollout_id: kept.rollout for kept in partition.need(self._database, left)}
            over.update({name: rollout for name, rollout in found.items() if rollout.state.is_over})
            return [over.get(rollout_id) or found[rollout_id] for rollout_id in rollout_ids]

        return self._endings.wait_until_over(read, timeout_s)

    def get_rollout(self, rollout_id: str) -> Rollout | None:
        (kept,) = partition.read(self._database, [rollout_id])
        return kept.rollout if kept else None

    def query_rollouts(self, group_id: str) -> list[Rollout]:
        return rollout_rows.query_group(self._database, group_id)

    def query_attempts(self, rollout_id: str) -> list[Attempt]:
        (kept,) = partition.read(self._database, [rollout_id])
        return list(kept.attempts) if kept else []

    def count_rollouts(self) -> dict[RolloutState, int]:
        return rollout_rows.count(self._database)

    def put_resource(self, resource: Resource) -> None:
        resources.put(self._database, columns.to_resource_row(resource))

    def get_resource(self, name: str, version: int | None = None) -> Resource | None:
        return resources.get(self._database, name, version)

    def lease_resource(
        self, name: str, holder: str, ttl_s: float, version: int | None = None, *, now_ns: int | None = None
    ) -> Resource | None:
        expires_ns = (now_ns or self._database.now_ns()) + int(ttl_s * 1e9)
        return resources.lease(self._database, name, holder, version, expires_ns)

    def release_resource(self, name: str, holder: str, version: int) -> None:
        resources.release(self._database, name, holder, version)

    def collect_resources(self, name: str, keep: int = 1, *, now_ns: int | None = None) -> list[Resource]:
        return resources.collect(self._database, name, keep, now_ns or self._database.now_ns())

    def append_metrics(self, run: str, step: int, metrics: Mapping[str, float]) -> None:
        resources.append_metrics(self._database, [(run, name, step, float(value)) for name, value in metrics.items()])

    def query_metrics(self, run: str) -> dict[str, list[tuple[int, float]]]:
        return resources.query_metrics(self._database, run)

    def gc(
        self, *, older_than_s: float | None = None, max_bytes: int | None = None, now_ns: int | None = None
    ) -> Collected:
        return retention.collect(self._database, older_than_s, max_bytes, now_ns or self._database.now_ns())

    def close(self) -> None:
        self._database.close()
