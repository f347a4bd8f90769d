"""Versioned resources, their leases, and metrics in SQLite."""

import math
import sqlite3
from collections.abc import Iterable
from typing import Any

from agl.store.columns import RESOURCE_COLUMNS, to_resource
from agl.store.protocol import Resource

_FIND = f"""
SELECT {RESOURCE_COLUMNS} FROM resources
WHERE name = :name AND version = coalesce(:version, version) ORDER BY version DESC LIMIT 1
"""

_COLLECT = f"""
DELETE FROM resources
WHERE name = :name
  AND version NOT IN (SELECT version FROM resources WHERE name = :name ORDER BY version DESC LIMIT :keep)
  AND version NOT IN (SELECT version FROM leases WHERE name = :name)
RETURNING {RESOURCE_COLUMNS}
"""


def put(db: sqlite3.Connection, row: tuple[Any, ...]) -> None:
    db.execute("INSERT OR REPLACE INTO resources VALUES (?, ?, ?, ?)", row)


def get(db: sqlite3.Connection, name: str, version: int | None) -> Resource | None:
    row = db.execute(_FIND, {"name": name, "version": version}).fetchone()
    return to_resource(row) if row else None


def lease(db: sqlite3.Connection, name: str, holder: str, version: int | None, expires_ns: int) -> Resource | None:
    found = get(db, name, version)
    if found is not None:
        db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?)", (name, found.version, holder, expires_ns))
    return found


def release(db: sqlite3.Connection, name: str, holder: str, version: int) -> None:
    db.execute("DELETE FROM leases WHERE name = ? AND version = ? AND holder = ?", (name, version, holder))


def collect(db: sqlite3.Connection, name: str, keep: int, now_ns: int) -> list[Resource]:
    db.execute("DELETE FROM leases WHERE name = ? AND expires_ns <= ?", (name, now_ns))
    rows = db.execute(_COLLECT, {"name": name, "keep": keep}).fetchall()
    return sorted(map(to_resource, rows), key=lambda resource: resource.version)


def append_metrics(db: sqlite3.Connection, rows: Iterable[tuple[str, str, int, float]]) -> None:
    db.executemany("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?)", rows)


def query_metrics(db: sqlite3.Connection, run: str) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for name, step, value in db.execute(
        "SELECT name, step, value FROM metrics WHERE run = ? ORDER BY name, step", (run,)
    ):
        # SQLite keeps a NaN as NULL.
        found.setdefault(name, []).append((step, math.nan if value is None else value))
    return found
