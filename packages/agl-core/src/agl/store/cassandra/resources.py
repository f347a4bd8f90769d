"""Versioned resources, their leases, and metrics in Cassandra.

All versions of a name and their leases are one partition, changed by compare-and-set on its column `revision`, so that
no version is leased and deleted. The row of a resource has no holder, the row of a lease has one.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar
from uuid import UUID, uuid4

from agl.store.cassandra.keyspace import Keyspace, Statement, retry_conflicts
from agl.store.cassandra.partition import DamagedRow
from agl.store.mapping import (
    PART_ROW,
    RESOURCE_ROW,
    from_part,
    from_resource,
    is_part,
    is_resource,
    no_version,
    to_resource,
)
from agl.store.protocol import Resource

Result = TypeVar("Result")

_READ: Final = "SELECT revision, version, holder, uri, metadata, expires_ns FROM resources WHERE name = ?"
_QUERY: Final = "SELECT holder, name, version, uri, metadata FROM resources"
_BEGIN: Final = "INSERT INTO resources (name, revision) VALUES (?, ?) IF NOT EXISTS"
_CHANGE: Final = "UPDATE resources SET revision = ? WHERE name = ? IF revision = ?"
_PUT: Final = "INSERT INTO resources (name, version, holder, uri, metadata, checksum) VALUES (?, ?, '', ?, ?, ?)"
_ALL: Final = f"SELECT {RESOURCE_ROW}, holder FROM resources"
_LEASE: Final = "INSERT INTO resources (name, version, holder, expires_ns) VALUES (?, ?, ?, ?)"
_DELETE: Final = "DELETE FROM resources WHERE name = ? AND version = ? AND holder = ?"
_PUT_PART: Final = f"INSERT INTO resource_parts ({PART_ROW}) VALUES (?, ?, ?, ?)"
_GET_PART: Final = "SELECT data FROM resource_parts WHERE name = ? AND version = ? AND digest = ?"
_ALL_PARTS: Final = f"SELECT {PART_ROW} FROM resource_parts"
_DELETE_PART: Final = "DELETE FROM resource_parts WHERE name = ? AND version = ? AND digest = ?"
_DELETE_PARTS: Final = "DELETE FROM resource_parts WHERE name = ? AND version = ?"
_PARTS_PER_PAGE: Final = 8
_PUT_METRIC: Final = "INSERT INTO metrics (run, name, step, value) VALUES (?, ?, ?, ?)"
_METRICS: Final = "SELECT name, step, value FROM metrics WHERE run = ?"


@dataclass(frozen=True, slots=True)
class _Versions:
    """The partition of a name: its versions, and the expiry of each lease in Unix ns."""

    revision: UUID | None
    resources: dict[int, Resource]
    leases: dict[tuple[int, str], int]

    def get(self, version: int | None) -> Resource | None:
        if version is not None:
            return self.resources.get(version)
        return self.resources[max(self.resources)] if self.resources else None


class CassandraResources:
    """The verbs of `Store` for resources and metrics."""

    _keyspace: Keyspace

    def put_resource(self, resource: Resource) -> None:
        row = from_resource(resource)
        _change(self._keyspace, resource.name, lambda _: ([(_PUT, row)], None))

    def add_resource(self, resource: Resource) -> Resource:
        row = from_resource(resource)

        def add(versions: _Versions) -> tuple[list[Statement], Resource]:
            found = versions.get(resource.version)
            return ([], found) if found else ([(_PUT, row)], to_resource(row[:-1]))

        return _change(self._keyspace, resource.name, add)

    def get_resource(self, name: str, version: int | None = None) -> Resource | None:
        return _read(self._keyspace, name).get(version)

    def query_resources(self, prefix: str = "") -> list[Resource]:
        rows = self._keyspace.scan(_QUERY)
        found = [to_resource(row) for holder, *row in rows if holder == "" and row[0].startswith(prefix)]
        return sorted(found, key=lambda resource: (resource.name.encode(), resource.version))

    def lease_resource(
        self, name: str, holder: str, ttl_s: float, version: int | None = None, *, now_ns: int | None = None
    ) -> Resource | None:
        expires_ns = (now_ns or self._keyspace.now_ns()) + int(ttl_s * 1e9)

        def lease(versions: _Versions) -> tuple[list[Statement], Resource | None]:
            found = versions.get(version)
            return ([(_LEASE, (name, found.version, _holder_key(holder), expires_ns))] if found else []), found

        return _change(self._keyspace, name, lease)

    def release_resource(self, name: str, holder: str, version: int) -> None:
        key = (version, _holder_key(holder))
        _change(self._keyspace, name, lambda found: ([(_DELETE, (name, *key))] if key in found.leases else [], None))

    def collect_resources(self, name: str, keep: int = 1, *, now_ns: int | None = None) -> list[Resource]:
        collect_ns = now_ns or self._keyspace.now_ns()

        def collect(versions: _Versions) -> tuple[list[Statement], list[Resource]]:
            expired = [key for key, expires_ns in versions.leases.items() if expires_ns <= collect_ns]
            leased = {version for version, _ in versions.leases.keys() - expired}
            newest = set(sorted(versions.resources, reverse=True)[:keep])
            old = sorted(versions.resources.keys() - leased - newest)
            keys = [*expired, *((version, "") for version in old)]
            return [(_DELETE, (name, *key)) for key in keys], [versions.resources[version] for version in old]

        collected = _change(self._keyspace, name, collect)
        self._keyspace.run([(_DELETE_PARTS, (name, resource.version)) for resource in collected])
        return collected

    def put_resource_part(self, name: str, version: int, digest: str, data: bytes) -> None:
        row = from_part(name, version, digest, data)
        if _read(self._keyspace, name).get(version) is None:
            raise no_version(name, version)
        self._keyspace.write(_PUT_PART, *row)

    def get_resource_part(self, name: str, version: int, digest: str) -> bytes | None:
        rows = self._keyspace.read(_GET_PART, name, version, digest)
        return rows[0][0] if rows else None

    def append_metrics(self, run: str, step: int, metrics: Mapping[str, float]) -> None:
        batch = [(_PUT_METRIC, (run, name, step, float(value))) for name, value in metrics.items()]
        self._keyspace.write_batches([batch] if batch else [])

    def query_metrics(self, run: str) -> dict[str, list[tuple[int, float]]]:
        found: dict[str, list[tuple[int, float]]] = {}
        for name, step, value in self._keyspace.scan(_METRICS, run):
            found.setdefault(name, []).append((step, value))
        return found


def damaged(db: Keyspace) -> Iterator[DamagedRow]:
    """The resources and parts whose rows are not what was stored."""
    for *row, holder in db.scan(_ALL):
        if holder == "" and not is_resource(row):
            name, version = row[:2]
            yield DamagedRow(f"the row of resource {name}@{version} is damaged", row, (_DELETE, (name, version, "")))
    for row in db.scan(_ALL_PARTS, page_rows=_PARTS_PER_PAGE):
        if not is_part(row):
            name, version, digest = row[:3]
            finding = f"the row of resource part {digest} of {name}@{version} is damaged"
            yield DamagedRow(finding, row, (_DELETE_PART, (name, version, digest)))


def _change(db: Keyspace, name: str, decide: Callable[[_Versions], tuple[list[Statement], Result]]) -> Result:
    """Run the statements that `decide` returns for the versions of `name`; returns its second item."""

    def change_once() -> tuple[bool, Result]:
        versions = _read(db, name)
        statements, result = decide(versions)
        if not statements:
            return True, result
        revision = uuid4()
        if versions.revision is None:  # A new name: create its partition, then try again.
            db.compare_and_set([(_BEGIN, (name, revision))], revision)
            return False, result
        return db.compare_and_set([(_CHANGE, (revision, name, versions.revision)), *statements], revision), result

    return retry_conflicts(f"resource {name}", change_once)


def _read(db: Keyspace, name: str) -> _Versions:
    rows = db.read(_READ, name)
    versions = _Versions(rows[0][0] if rows else None, {}, {})
    for _, version, holder, uri, metadata, expires_ns in rows:
        if holder == "":
            versions.resources[version] = to_resource((name, version, uri, metadata))
        elif holder is not None:
            versions.leases[version, holder] = expires_ns
    return versions


def _holder_key(holder: str) -> str:
    """Column `holder` of a lease: never empty, which it is for the resource."""
    return f"={holder}"
