"""The store class of the SQL backends."""

from typing import ClassVar

from agl.store.end_notifier import EndNotifier
from agl.store.protocol import Store
from agl.store.sql.database import DatabaseT
from agl.store.sql.resources import SqlResources
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
    """All of `Store` but for spans and `gc`, which depend on how a backend stores spans."""

    LAST_SPAN: ClassVar[str]
    """Query for the last rollout id that a span names, and the trace id of the last span."""

    def __init__(self, uri: str, database: DatabaseT, ends: EndNotifier) -> None:
        self.uri = uri
        self._database = database
        self._ends = ends

    def count_spans(self) -> int:
        return self._database.read(lambda db: db.execute("SELECT count(*) FROM spans").fetchone()[0])

    def last_rollout_id(self) -> str | None:
        rollout_id, trace_id = self._database.read(lambda db: db.execute(self.LAST_SPAN).fetchone()) or (None, b"")
        return rollout_id or (trace_id or b"").hex() or None

    def rollout_ids(self) -> list[str]:
        rows = self._database.read(lambda db: db.execute(_ROLLOUT_IDS).fetchall())
        return [rollout_id or trace_id.hex() for rollout_id, trace_id in rows]

    def close(self) -> None:
        self._database.close()
