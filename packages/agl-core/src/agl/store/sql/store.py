"""The store class of the SQL backends."""

from typing import Any, ClassVar

from agl.store.end_notifier import EndNotifier
from agl.store.protocol import Collected, Store
from agl.store.retention import Limits
from agl.store.sql.database import DatabaseT
from agl.store.sql.resources import SqlResources
from agl.store.sql.retention import Retention
from agl.store.sql.rollouts import SqlRollouts

_ROLLOUT_IDS = """
SELECT rollout_id, trace_id FROM (
    SELECT rollout_id, NULL AS trace_id, min(arrival) AS first FROM spans WHERE rollout_id IS NOT NULL
    GROUP BY rollout_id
    UNION ALL
    SELECT NULL, trace_id, min(arrival) FROM spans GROUP BY trace_id HAVING max(rollout_id) IS NULL
) found ORDER BY first
"""


class SqlStore(SqlRollouts[DatabaseT], SqlResources[DatabaseT], Store):
    """All of `Store` except `append_rows` and `query_rows`, which depend on how a backend stores spans."""

    LAST_SPAN: ClassVar[str]
    """Query for the rollout that the last span to arrive names, if any, and for its trace."""
    RETENTION: ClassVar[type[Retention[Any]]]

    def __init__(self, uri: str, database: DatabaseT, ends: EndNotifier) -> None:
        self.uri = uri
        self._database = database
        self._ends = ends

    def count_spans(self) -> int:
        return self._database.read(lambda db: db.execute("SELECT count(*) FROM spans").fetchone()[0])

    def last_rollout_id(self) -> str | None:
        last = self._database.read(lambda db: db.execute(self.LAST_SPAN).fetchone())
        if last is None or last[0] is not None:
            return last and last[0]
        self.query_rows(last[1].hex())  # Indexes what its trace is joined by.
        owners = self._database.read(lambda db: db.execute(self.RETENTION.OWNERS, {"trace": last[1]}).fetchall())
        return min((name for (name,) in owners), default=last[1].hex())

    def rollout_ids(self) -> list[str]:
        rows = self._database.read(lambda db: db.execute(_ROLLOUT_IDS).fetchall())
        return [rollout_id or trace_id.hex() for rollout_id, trace_id in rows]

    def gc(
        self, *, older_than_s: float | None = None, max_bytes: int | None = None, now_ns: int | None = None
    ) -> Collected:
        limits = Limits.of(older_than_s, max_bytes, now_ns or self._database.now_ns())
        return self.RETENTION(self._database, limits).collect()

    def close(self) -> None:
        self._database.close()
