"""The verbs of `agl.store.protocol` on PostgreSQL: each is one transaction of the functions beside this file."""

from collections.abc import Mapping, Sequence
from typing import Final

from agl.store import columns
from agl.store.postgres import resources, retention, spans
from agl.store.postgres import rollouts as rollout_rows
from agl.store.postgres.database import Connection, Database
from agl.store.postgres.listener import Listener
from agl.store.postgres.schema import MIGRATIONS
from agl.store.protocol import Collected, Resource, Store
from agl.store.rollout import Attempt, Rollout
from agl.store.span_row import SpanRow
from agl.store.states import AttemptState, RolloutState
from agl.store.waiting import Endings

_LOOK_EVERY_S: Final = 1.0
"""How long an end may go unnoticed while the server cannot tell of it."""


class PostgresStore(Store):
    """A store in the schema `agl` of the database at `uri`, shared by any number of machines.

    Raises StoreError where the server cannot be reached or the schema is not ours. When the server restarts, verbs
    fail until it answers again and then go on.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._database = Database(uri, MIGRATIONS)
        self._endings = Endings(_LOOK_EVERY_S)
        self._listener = Listener(self._database, self._endings)

    def append_rows(self, rows: Sequence[SpanRow]) -> int:
        now_ns = self._database.now_ns()
        kept, attempt_ids = spans.once(rows), spans.attempt_ids(rows)

        def append(db: Connection) -> int:
            rollout_rows.beat_by_spans(db, attempt_ids, now_ns)
            return spans.insert(db, kept, now_ns)

        try:
            return self._database.write(append) if kept else 0
        except spans.MissingPartition:  # They are the first of the day.
            self._database.write(lambda db: spans.make_partition(db, now_ns // spans.DAY_NS))
            return self._database.write(append)

    def query_rows(self, rollout_id: str) -> list[bytes]:
        return self._database.read(lambda db: spans.query(db, rollout_id))

    def count_spans(self) -> int:
        return self._database.read(spans.count)

    def last_rollout_id(self) -> str | None:
        return self._database.read(spans.last_rollout_id)

    def rollout_ids(self) -> list[str]:
        return self._database.read(spans.rollout_ids)

    def enqueue_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        rows = [columns.to_row(rollout) for rollout in rollouts]
        self._database.write(lambda db: rollout_rows.enqueue(db, rows))

    def lease_rollout(self, worker_id: str, rollout_id: str | None = None) -> tuple[Rollout, Attempt] | None:
        return self._database.write(lambda db: rollout_rows.lease(db, worker_id, rollout_id, self._database.now_ns()))

    def heartbeat(self, attempt_ids: Sequence[str]) -> list[str]:
        return self._database.write(lambda db: rollout_rows.heartbeat(db, attempt_ids, self._database.now_ns()))

    def finish_attempt(self, attempt_id: str, state: AttemptState, error: str | None = None) -> Rollout:
        return self._database.write(
            lambda db: rollout_rows.finish(db, attempt_id, state, error, self._database.now_ns())
        )

    def cancel_rollouts(self, rollout_ids: Sequence[str]) -> None:
        self._database.write(lambda db: rollout_rows.cancel(db, rollout_ids, self._database.now_ns()))

    def end_overdue_attempts(self, now_ns: int | None = None) -> list[Attempt]:
        return self._database.write(lambda db: rollout_rows.end_overdue(db, now_ns or self._database.now_ns()))

    def wait_for_rollouts(self, rollout_ids: Sequence[str], timeout_s: float | None = None) -> list[Rollout]:
        self._listener.start()
        return self._endings.wait_until_over(
            lambda: self._database.read(lambda db: rollout_rows.read(db, rollout_ids)), timeout_s
        )

    def get_rollout(self, rollout_id: str) -> Rollout | None:
        return self._database.read(lambda db: rollout_rows.get(db, rollout_id))

    def query_rollouts(self, group_id: str) -> list[Rollout]:
        return self._database.read(lambda db: rollout_rows.query_group(db, group_id))

    def query_attempts(self, rollout_id: str) -> list[Attempt]:
        return self._database.read(lambda db: rollout_rows.query_attempts(db, rollout_id))

    def count_rollouts(self) -> dict[RolloutState, int]:
        return self._database.read(rollout_rows.count)

    def put_resource(self, resource: Resource) -> None:
        row = columns.to_resource_row(resource)
        self._database.write(lambda db: resources.put(db, row))

    def get_resource(self, name: str, version: int | None = None) -> Resource | None:
        return self._database.read(lambda db: resources.get(db, name, version))

    def lease_resource(
        self, name: str, holder: str, ttl_s: float, version: int | None = None, *, now_ns: int | None = None
    ) -> Resource | None:
        expires_ns = (now_ns or self._database.now_ns()) + int(ttl_s * 1e9)
        return self._database.write(lambda db: resources.lease(db, name, holder, version, expires_ns))

    def release_resource(self, name: str, holder: str, version: int) -> None:
        self._database.write(lambda db: resources.release(db, name, holder, version))

    def collect_resources(self, name: str, keep: int = 1, *, now_ns: int | None = None) -> list[Resource]:
        return self._database.write(lambda db: resources.collect(db, name, keep, now_ns or self._database.now_ns()))

    def append_metrics(self, run: str, step: int, metrics: Mapping[str, float]) -> None:
        rows = [(run, name, step, float(value)) for name, value in metrics.items()]
        self._database.write(lambda db: resources.append_metrics(db, rows))

    def query_metrics(self, run: str) -> dict[str, list[tuple[int, float]]]:
        return self._database.read(lambda db: resources.query_metrics(db, run))

    def gc(
        self, *, older_than_s: float | None = None, max_bytes: int | None = None, now_ns: int | None = None
    ) -> Collected:
        return retention.collect(self._database, older_than_s, max_bytes, now_ns or self._database.now_ns())

    def close(self) -> None:
        self._listener.close()
        self._database.close()
