"""Repairs the file of a store: a new file has what is sound, and the damaged rollouts are set aside."""

import os
import shutil
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from xxhash import xxh3_64_digest

from agl.errors import StoreError
from agl.store.membership import first_keys
from agl.store.retention import Limits
from agl.store.span_row import damaged_span, parse
from agl.store.sql.damage import TABLES
from agl.store.sql.database import write_many
from agl.store.sql.retention import parameters_of
from agl.store.sqlite.damage import SPAN_COLUMNS, Damage, find, read_spans, read_table
from agl.store.sqlite.database import SqliteConnection, SqliteDatabase, connect, store_error
from agl.store.sqlite.maintenance import check_version
from agl.store.sqlite.retention import SqliteRetention
from agl.store.sqlite.schema import FUNCTIONS, MIGRATIONS
from agl.store.sqlite.spans import QUERY
from agl.store.sqlite.store import SqliteStore

_ROWS_PER_WRITE: Final = 500
_LOCK_MS: Final = 1000
_NO_TRACE: Final = b"\xff" * 16
_FOREVER_NS: Final = 2**63 - 1
_OTHER_TABLES: Final = {
    "leases": "name, version, holder",
    "metrics": "run, name, step",
    "clock": "boot_id",
    "pending": "place",
    "decisions": "name",
}
"""Table to its primary key."""
_INDEX_ASKS: Final = "INSERT INTO asks SELECT asked, arrival FROM spans WHERE asked IS NOT NULL"


@dataclass(frozen=True, slots=True)
class Repaired:
    """The result of `repair`."""

    damage: Damage
    damaged: Path
    """The file as it was."""
    set_aside: Path
    """A store with the sound spans of the damaged rollouts."""


def repair(path: Path) -> Repaired | None:
    """Replace the file by one without its damaged rollouts, which are set aside; None if there is no damage.

    The states of rollouts stay. Raises StoreError, and changes nothing, if another process has the file open.
    """
    new, set_aside = path.with_name(f"{path.name}.repaired"), path.with_name(f"{path.stem}.set-aside{path.suffix}")
    damaged = next(name for number in range(1, 1000) if not (name := Path(f"{path}.damaged-{number}")).exists())
    new.unlink(missing_ok=True)
    try:
        with closing(connect(path)) as old:
            _lock(old, path)
            damage = find(old)
            if not damage.lines():
                return None
            with closing(SqliteDatabase(str(new), MIGRATIONS, FUNCTIONS)) as database:
                _copy(old, database)
                _set_aside(database, list(damage.rollouts), set_aside)
            for file in (new, set_aside):
                _copy_access(path, file)
            # Without a write-ahead log, which SQLite would otherwise delete by its name after the file is renamed.
            old.execute("ROLLBACK")
            old.execute("PRAGMA journal_mode = DELETE").fetchall()
            damaged.hardlink_to(path)
            new.replace(path)
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
            raise StoreError(f"another program has {path} open: end it, and repair the store then") from error
        raise store_error(f"cannot repair the store {path}", error) from error
    except OSError as error:
        raise StoreError(f"cannot repair the store {path}: {error}") from error
    finally:
        new.unlink(missing_ok=True)
    return Repaired(damage, damaged, set_aside)


def _lock(db: SqliteConnection, path: Path) -> None:
    """Keep other processes away from the file."""
    db.execute(f"PRAGMA busy_timeout = {_LOCK_MS}")
    db.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
    check_version(db, path)
    db.execute("BEGIN IMMEDIATE")


def _copy(old: SqliteConnection, new: SqliteDatabase) -> None:
    """Copy what is sound."""
    sound = (row for row, touched in read_spans(old) if row is not None and not touched)
    while rows := list(islice(sound, _ROWS_PER_WRITE)):
        _insert(new, f"spans ({SPAN_COLUMNS})", rows)
    for table in TABLES:
        number, has_place = table.columns.count(",") + 1, table.name == "rollouts"
        columns, order = (f"{table.columns}, place", "place") if has_place else (table.columns, ", ".join(table.keys))
        rows = read_table(old, f"SELECT {columns} FROM {table.name}", order)
        _insert(new, f"{table.name} ({columns})", [row for row in rows if table.is_whole(row[:number])])
    for name, key in _OTHER_TABLES.items():
        _insert(new, name, read_table(old, f"SELECT * FROM {name}", key))
    write_many(new, _INDEX_ASKS, [()])


def _set_aside(database: SqliteDatabase, rollouts: Sequence[str], path: Path) -> None:
    """Move what is left of these rollouts into the store at `path`."""
    retention = SqliteRetention(database, Limits.of(None, None, 0))

    def remove(db: SqliteConnection) -> list[bytes]:
        rows: list[bytes] = []
        for name in rollouts:
            rows += [row[0] for row in db.execute(QUERY, first_keys(name))]
            rows.append(damaged_span(name, _NO_TRACE, xxh3_64_digest(name.encode()), 1))
            for key in retention.keys(db, name)[1]:
                retention.delete_spans(db, parameters_of(key) | {"last_ns": _FOREVER_NS})
        return rows

    rows = database.write(remove)
    with closing(SqliteStore(str(path), uri=f"sqlite:///{path}")) as store:
        store.append_rows([row for otlp in rows for row in parse(otlp).rows])


def _copy_access(source: Path, target: Path) -> None:
    """Give `target` the permissions of `source`, and its owner if we may."""
    shutil.copymode(source, target)
    if os.geteuid() == 0:
        shutil.chown(target, source.stat().st_uid, source.stat().st_gid)


def _insert(database: SqliteDatabase, table: str, rows: Sequence[Sequence[Any]]) -> None:
    if rows:
        write_many(database, f"INSERT OR IGNORE INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)
