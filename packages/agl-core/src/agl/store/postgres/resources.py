"""Versioned resources, their leases, and metrics in PostgreSQL."""

from collections.abc import Sequence
from typing import Any

from agl.store.columns import RESOURCE_COLUMNS, to_resource
from agl.store.postgres.database import LOCK, Connection
from agl.store.protocol import Resource

_PUT = f"""
INSERT INTO resources ({RESOURCE_COLUMNS}) VALUES (%s, %s, %s, %s)
ON CONFLICT (name, version) DO UPDATE SET uri = excluded.uri, metadata = excluded.metadata
"""

_FIND = f"""
SELECT {RESOURCE_COLUMNS} FROM resources
WHERE name = %(name)s AND version = coalesce(%(version)s::integer, version) ORDER BY version DESC LIMIT 1
"""

_LEASE = """
INSERT INTO leases (name, version, holder, expires_ns) VALUES (%s, %s, %s, %s)
ON CONFLICT (name, version, holder) DO UPDATE SET expires_ns = excluded.expires_ns
"""

_COLLECT = f"""
DELETE FROM resources
WHERE name = %(name)s
  AND version NOT IN (SELECT version FROM resources WHERE name = %(name)s ORDER BY version DESC LIMIT %(keep)s)
  AND version NOT IN (SELECT version FROM leases WHERE name = %(name)s)
RETURNING {RESOURCE_COLUMNS}
"""

_PUT_METRIC = """
INSERT INTO metrics (run, name, step, value) VALUES (%s, %s, %s, %s)
ON CONFLICT (run, name, step) DO UPDATE SET value = excluded.value
"""


def put(db: Connection, row: tuple[Any, ...]) -> None:
    db.execute(_PUT, row)


def get(db: Connection, name: str, version: int | None) -> Resource | None:
    row = db.execute(_FIND, {"name": name, "version": version}).fetchone()
    return to_resource(row) if row else None


def lease(db: Connection, name: str, holder: str, version: int | None, expires_ns: int) -> Resource | None:
    _lock(db, name)
    found = get(db, name, version)
    if found is not None:
        db.execute(_LEASE, (name, found.version, holder, expires_ns))
    return found


def release(db: Connection, name: str, holder: str, version: int) -> None:
    db.execute("DELETE FROM leases WHERE name = %s AND version = %s AND holder = %s", (name, version, holder))


def collect(db: Connection, name: str, keep: int, now_ns: int) -> list[Resource]:
    _lock(db, name)
    db.execute("DELETE FROM leases WHERE name = %s AND expires_ns <= %s", (name, now_ns))
    rows = db.execute(_COLLECT, {"name": name, "keep": keep}).fetchall()
    return sorted(map(to_resource, rows), key=lambda resource: resource.version)


def append_metrics(db: Connection, rows: Sequence[tuple[str, str, int, float]]) -> None:
    with db.cursor() as cursor:
        cursor.executemany(_PUT_METRIC, sorted(rows))


def query_metrics(db: Connection, run: str) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for name, step, value in db.execute(
        "SELECT name, step, value FROM metrics WHERE run = %s ORDER BY name, step", (run,)
    ):
        found.setdefault(name, []).append((step, value))
    return found


def _lock(db: Connection, name: str) -> None:
    """Until the transaction ends nobody leases or collects versions of it: no lease of what is being collected."""
    db.execute("SELECT pg_advisory_xact_lock(%s, hashtext(%s))", (LOCK, name))
