"""Versioned resources, their leases, and metrics in an SQL database."""

import math
from collections.abc import Mapping
from typing import Generic

from agl.store.mapping import (
    PART_ROW,
    RESOURCE_COLUMNS,
    RESOURCE_ROW,
    from_part,
    from_resource,
    no_version,
    to_resource,
)
from agl.store.protocol import Resource
from agl.store.sql.database import Connection, DatabaseT, write_many

_PUT = f"""
INSERT INTO resources ({RESOURCE_ROW}) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (name, version) DO UPDATE SET uri = excluded.uri, metadata = excluded.metadata, checksum = excluded.checksum
"""
_ADD = f"INSERT INTO resources ({RESOURCE_ROW}) VALUES (?, ?, ?, ?, ?) ON CONFLICT (name, version) DO NOTHING"
_GET = f"""
SELECT {RESOURCE_COLUMNS} FROM resources
WHERE name = :name AND version = coalesce(CAST(:version AS integer), version) ORDER BY version DESC LIMIT 1
"""
_QUERY = f"""
SELECT {RESOURCE_COLUMNS} FROM resources
WHERE substr(name, 1, length(CAST(:prefix AS text))) = :prefix ORDER BY name, version
"""
_COLLECT = f"""
DELETE FROM resources
WHERE name = :name
  AND version NOT IN (SELECT version FROM resources WHERE name = :name ORDER BY version DESC LIMIT :keep)
  AND version NOT IN (SELECT version FROM leases WHERE name = :name)
RETURNING {RESOURCE_COLUMNS}
"""
_LEASE = """
INSERT INTO leases (name, version, holder, expires_ns) VALUES (?, ?, ?, ?)
ON CONFLICT (name, version, holder) DO UPDATE SET expires_ns = excluded.expires_ns
"""
_RELEASE = "DELETE FROM leases WHERE name = ? AND version = ? AND holder = ?"
_DELETE_EXPIRED = "DELETE FROM leases WHERE name = ? AND expires_ns <= ?"
_PUT_PART = (
    f"INSERT INTO resource_parts ({PART_ROW}) VALUES (?, ?, ?, ?) ON CONFLICT (name, version, digest) DO NOTHING"
)
_GET_PART = "SELECT data FROM resource_parts WHERE name = ? AND version = ? AND digest = ?"
_COLLECT_PARTS = """
DELETE FROM resource_parts WHERE name = :name AND version NOT IN (SELECT version FROM resources WHERE name = :name)
"""
_PUT_METRIC = """
INSERT INTO metrics (run, name, step, value) VALUES (?, ?, ?, ?)
ON CONFLICT (run, name, step) DO UPDATE SET value = excluded.value
"""
_METRICS = "SELECT name, step, value FROM metrics WHERE run = ? ORDER BY name, step"


class SqlResources(Generic[DatabaseT]):
    """The verbs of `Store` for resources and metrics, each in one transaction.

    A lease and a collection of the same name run one after the other, so that no version is leased and deleted.
    """

    _database: DatabaseT

    def put_resource(self, resource: Resource) -> None:
        write_many(self._database, _PUT, [from_resource(resource)])

    def add_resource(self, resource: Resource) -> Resource:
        def add(db: Connection) -> Resource:
            db.execute(_ADD, from_resource(resource))
            return _get(db, resource.name, resource.version) or resource

        return self._database.write(add)

    def get_resource(self, name: str, version: int | None = None) -> Resource | None:
        return self._database.read(lambda db: _get(db, name, version))

    def query_resources(self, prefix: str = "") -> list[Resource]:
        rows = self._database.read(lambda db: db.execute(_QUERY, {"prefix": prefix}).fetchall())
        return list(map(to_resource, rows))

    def lease_resource(
        self, name: str, holder: str, ttl_s: float, version: int | None = None, *, now_ns: int | None = None
    ) -> Resource | None:
        expires_ns = (now_ns or self._database.now_ns()) + int(ttl_s * 1e9)

        def lease(db: Connection) -> Resource | None:
            db.lock_name(name)
            found = _get(db, name, version)
            if found is not None:
                db.execute(_LEASE, (name, found.version, holder, expires_ns))
            return found

        return self._database.write(lease)

    def release_resource(self, name: str, holder: str, version: int) -> None:
        write_many(self._database, _RELEASE, [(name, version, holder)])

    def collect_resources(self, name: str, keep: int = 1, *, now_ns: int | None = None) -> list[Resource]:
        def collect(db: Connection) -> list[Resource]:
            db.lock_name(name)
            db.execute(_DELETE_EXPIRED, (name, now_ns or self._database.now_ns()))
            rows = db.execute(_COLLECT, {"name": name, "keep": keep}).fetchall()
            db.execute(_COLLECT_PARTS, {"name": name})
            return sorted(map(to_resource, rows), key=lambda resource: resource.version)

        return self._database.write(collect)

    def put_resource_part(self, name: str, version: int, digest: str, data: bytes) -> None:
        row = from_part(name, version, digest, data)

        def put(db: Connection) -> None:
            if _get(db, name, version) is None:
                raise no_version(name, version)
            db.execute(_PUT_PART, row)

        self._database.write(put)

    def get_resource_part(self, name: str, version: int, digest: str) -> bytes | None:
        row = self._database.read(lambda db: db.execute(_GET_PART, (name, version, digest)).fetchone())
        return row and row[0]

    def append_metrics(self, run: str, step: int, metrics: Mapping[str, float]) -> None:
        # Sorted: two transactions that write the same keys in different orders would deadlock.
        rows = [(run, name, step, float(value)) for name, value in sorted(metrics.items())]
        write_many(self._database, _PUT_METRIC, rows)

    def query_metrics(self, run: str) -> dict[str, list[tuple[int, float]]]:
        found: dict[str, list[tuple[int, float]]] = {}
        for name, step, value in self._database.read(lambda db: db.execute(_METRICS, (run,)).fetchall()):
            # SQLite stores NaN as NULL.
            found.setdefault(name, []).append((step, math.nan if value is None else value))
        return found


def _get(db: Connection, name: str, version: int | None) -> Resource | None:
    row = db.execute(_GET, {"name": name, "version": version}).fetchone()
    return to_resource(row) if row else None
