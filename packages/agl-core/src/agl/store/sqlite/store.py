"""The verbs of `agl.store.protocol` on one SQLite file: each is one transaction of the functions beside this file."""

import sqlite3
import time
from collections.abc import Mapping, Sequence

from agl.errors import StoreError
from agl.store.columns import to_resource_row, to_row
from agl.store.protocol import Collected, Resource, Store
from agl.store.rollout import Attempt, Rollout
from agl.store.span_row import SpanRow
from agl.store.sqlite import resources, retention, spans
from agl.store.sqlite import rollouts as rollout_rows
from agl.store.sqlite.database import Database
from agl.store.sqlite.schema import MIGRATIONS
from agl.store.states import AttemptState, RolloutState
from agl.store.waiting import Endings


class SqliteStore(Store):
    """A store in the file at `path` (`:memory:` for none), safe for several threads and processes.

    Raises StoreError when the file is not a store.
    """

    def __init__(self, path: str, *, uri: str) -> None:
        if not path:
            raise StoreError(f"store URI {uri!r} names no file; write sqlite:///path.db")
        self.uri = uri
        self._database = Database(path, MIGRATIONS)
        self._endings = Endings()

    def append_rows(self, rows: Sequence[SpanRow]) -> int:
        now_ns = time.time_ns()
        values = spans.Values.of(rows, now_ns)
        attempt_ids = {row.attempt_id for row in rows if row.attempt_id}

        def append(db: sqlite3.Connection) -> int:
            rollout_rows.beat_by_spans(db, attempt_ids, now_ns)
            return spans.insert(db, values)

        return self._database.write(append) if rows else 0

    def query_rows(self, rollout_id: str) -> list[bytes]:
        found = self._database.read(lambda db: spans.query(db, rollout_id))
        while found is None:
            # In one transaction with the last of the sorting: others may append without end.
            found = self._database.write(lambda db: None if spans.sort_asks(db) else spans.query(db, rollout_id))
        return found

    def count_spans(self) -> int:
        return self._database.read(lambda db: db.execute("SELECT count(*) FROM spans").fetchone()[0])

    def last_rollout_id(self) -> str | None:
        return self._database.read(spans.last_rollout_id)

    def rollout_ids(self) -> list[str]:
        return self._database.read(spans.rollout_ids)

    def enqueue_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        rows = [to_row(rollout) for rollout in rollouts]
        self._database.write(lambda db: rollout_rows.enqueue(db, rows))

    def lease_rollout(self, worker_id: str, rollout_id: str | None = None) -> tuple[Rollout, Attempt] | None:
        return self._database.write(lambda db: rollout_rows.lease(db, worker_id, rollout_id, time.time_ns()))

    def heartbeat(self, attempt_ids: Sequence[str]) -> list[str]:
        return self._database.write(lambda db: rollout_rows.heartbeat(db, attempt_ids, time.time_ns()))

    def finish_attempt(self, attempt_id: str, state: AttemptState, error: str | None = None) -> Rollout:
        rollout = self._database.write(lambda db: rollout_rows.finish(db, attempt_id, state, error, time.time_ns()))
        self._endings.announce()
        return rollout

    def cancel_rollouts(self, rollout_ids: Sequence[str]) -> None:
        self._database.write(lambda db: rollout_rows.cancel(db, rollout_ids, time.time_ns()))
        self._endings.announce()

    def end_overdue_attempts(self, now_ns: int | None = None) -> list[Attempt]:
        ended = self._database.write(lambda db: rollout_rows.end_overdue(db, now_ns or time.time_ns()))
        self._endings.announce()
        return ended

    def wait_for_rollouts(self, rollout_ids: Sequence[str], timeout_s: float | None = None) -> list[Rollout]:
        def read() -> list[Rollout]:
            return self._database.read(lambda db: [rollout_rows.need(db, rollout_id) for rollout_id in rollout_ids])

        return self._endings.wait_until_over(read, timeout_s)

    def get_rollout(self, rollout_id: str) -> Rollout | None:
        return self._database.read(lambda db: rollout_rows.get(db, rollout_id))

    def query_rollouts(self, group_id: str) -> list[Rollout]:
        return self._database.read(lambda db: rollout_rows.query_group(db, group_id))

    def query_attempts(self, rollout_id: str) -> list[Attempt]:
        return self._database.read(lambda db: rollout_rows.query_attempts(db, rollout_id))

    def count_rollouts(self) -> dict[RolloutState, int]:
        return self._database.read(rollout_rows.count)

    def put_resource(self, resource: Resource) -> None:
        row = to_resource_row(resource)
        self._database.write(lambda db: resources.put(db, row))

    def get_resource(self, name: str, version: int | None = None) -> Resource | None:
        return self._database.read(lambda db: resources.get(db, name, version))

    def lease_resource(
        self, name: str, holder: str, ttl_s: float, version: int | None = None, *, now_ns: int | None = None
    ) -> Resource | None:
        expires_ns = (now_ns or time.time_ns()) + int(ttl_s * 1e9)
        return self._database.write(lambda db: resources.lease(db, name, holder, version, expires_ns))

    def release_resource(self, name: str, holder: str, version: int) -> None:
        self._database.write(lambda db: resources.release(db, name, holder, version))

    def collect_resources(self, name: str, keep: int = 1, *, now_ns: int | None = None) -> list[Resource]:
        return self._database.write(lambda db: resources.collect(db, name, keep, now_ns or time.time_ns()))

    def append_metrics(self, run: str, step: int, metrics: Mapping[str, float]) -> None:
        rows = [(run, name, step, float(value)) for name, value in metrics.items()]
        self._database.write(lambda db: resources.append_metrics(db, rows))

    def query_metrics(self, run: str) -> dict[str, list[tuple[int, float]]]:
        return self._database.read(lambda db: resources.query_metrics(db, run))

    def gc(
        self, *, older_than_s: float | None = None, max_bytes: int | None = None, now_ns: int | None = None
    ) -> Collected:
        now_ns = now_ns or time.time_ns()
        before_ns = 0 if older_than_s is None else now_ns - int(older_than_s * 1e9)
        return retention.collect(self._database, retention.Limits(before_ns, max_bytes, now_ns))

    def close(self) -> None:
        self._database.close()
