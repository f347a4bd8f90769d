"""Versioned resources, their leases, and metrics in Cassandra.

All versions of a name and their leases are one partition, changed where `revision` is as it was read: so nothing is
leased that is being collected. A resource is the row without a holder.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from uuid import UUID, uuid4

from agl.errors import StoreError
from agl.store.cassandra.database import Database, Statement
from agl.store.columns import to_resource
from agl.store.protocol import Resource

Result = TypeVar("Result")

_MOST_TRIES: Final = 50
_LONGEST_PAUSE_S: Final = 0.05

_READ = "SELECT revision, version, holder, uri, metadata, expires_ns FROM resources WHERE name = ?"
_BEGIN = "INSERT INTO resources (name, revision) VALUES (?, ?) IF NOT EXISTS"
_CHANGE = "UPDATE resources SET revision = ? WHERE name = ? IF revision = ?"
_PUT = "INSERT INTO resources (name, version, holder, uri, metadata) VALUES (?, ?, '', ?, ?)"
_LEASE = "INSERT INTO resources (name, version, holder, expires_ns) VALUES (?, ?, ?, ?)"
_DELETE = "DELETE FROM resources WHERE name = ? AND version = ? AND holder = ?"
_PUT_METRIC = "INSERT INTO metrics (run, name, step, value) VALUES (?, ?, ?, ?)"


@dataclass(frozen=True, slots=True)
class _Shelf:
    """All there is of a name: versions, and when each lease of one ends."""

    revision: UUID | None
    versions: dict[int, Resource]
    leases: dict[tuple[int, str], int]

    def get(self, version: int | None) -> Resource | None:
        if version is not None:
            return self.versions.get(version)
        return self.versions[max(self.versions)] if self.versions else None


def put(db: Database, row: tuple[Any, ...]) -> None:
    _change(db, row[0], lambda _: ([(_PUT, row)], None))


def get(db: Database, name: str, version: int | None) -> Resource | None:
    return _read(db, name).get(version)


def lease(db: Database, name: str, holder: str, version: int | None, expires_ns: int) -> Resource | None:
    def decide(shelf: _Shelf) -> tuple[list[Statement], Resource | None]:
        found = shelf.get(version)
        return ([(_LEASE, (name, found.version, _key(holder), expires_ns))] if found else []), found

    return _change(db, name, decide)


def release(db: Database, name: str, holder: str, version: int) -> None:
    def decide(shelf: _Shelf) -> tuple[list[Statement], None]:
        key = (version, _key(holder))
        return ([(_DELETE, (name, *key))] if key in shelf.leases else []), None

    _change(db, name, decide)


def collect(db: Database, name: str, keep: int, now_ns: int) -> list[Resource]:
    def decide(shelf: _Shelf) -> tuple[list[Statement], list[Resource]]:
        ended = [key for key, expires_ns in shelf.leases.items() if expires_ns <= now_ns]
        leased = {version for version, _ in shelf.leases.keys() - ended}
        newest = set(sorted(shelf.versions, reverse=True)[:keep])
        old = sorted(shelf.versions.keys() - leased - newest)
        gone = [*ended, *((version, "") for version in old)]
        return [(_DELETE, (name, *key)) for key in gone], [shelf.versions[version] for version in old]

    return _change(db, name, decide)


def append_metrics(db: Database, rows: Sequence[tuple[str, str, int, float]]) -> None:
    db.write_batches([[(_PUT_METRIC, row) for row in rows]] if rows else [])


def query_metrics(db: Database, run: str) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for name, step, value in db.scan("SELECT name, step, value FROM metrics WHERE run = ?", run):
        found.setdefault(name, []).append((step, value))
    return found


def _change(db: Database, name: str, decide: Callable[[_Shelf], tuple[list[Statement], Result]]) -> Result:
    """Do what `decide` says; it is asked again where another has changed the shelf meanwhile."""
    for _ in range(_MOST_TRIES):
        shelf = _read(db, name)
        statements, result = decide(shelf)
        revision = uuid4()
        if shelf.revision is None and statements:
            db.compare_and_set([(_BEGIN, (name, revision))], revision)
            continue
        if not statements or db.compare_and_set([(_CHANGE, (revision, name, shelf.revision)), *statements], revision):
            return result
        time.sleep(random.uniform(0, _LONGEST_PAUSE_S))
    raise StoreError(f"resource {name} was changed by others {_MOST_TRIES} times in a row; try again")


def _read(db: Database, name: str) -> _Shelf:
    rows = db.read(_READ, name)
    shelf = _Shelf(rows[0][0] if rows else None, {}, {})
    for _, version, holder, uri, metadata, expires_ns in rows:
        if holder == "":
            shelf.versions[version] = to_resource((name, version, uri, metadata))
        elif holder is not None:
            shelf.leases[version, holder] = expires_ns
    return shelf


def _key(holder: str) -> str:
    """Not empty, as that of the resource itself is."""
    return f"={holder}"
