"""Check, back up and remove the file of a store, also while other processes have it open."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from agl.errors import DamageError, StoreError
from agl.store.sqlite.damage import find
from agl.store.sqlite.database import SqliteConnection, connect, is_damage, pragma, store_error
from agl.store.sqlite.schema import MIGRATIONS


def check(path: Path) -> list[str]:
    """Damage in the file, one a line; reads the whole file, and compares each span with its checksum.

    Raises StoreError if the file cannot be read, or is of an older version, which has no checksums.
    """
    try:
        with closing(connect(path)) as db:
            check_version(db, path)
            return find(db).lines()
    except sqlite3.Error as error:
        if is_damage(error):
            return [str(error)]
        raise store_error(f"cannot check the store {path}", error) from error


def check_version(db: SqliteConnection, path: Path) -> None:
    """Raise StoreError unless the file has the schema of this program."""
    version = pragma(db, "user_version")
    if version != len(MIGRATIONS):
        raise StoreError(f"{path} has schema version {version}, expected {len(MIGRATIONS)}: `agl store migrate` first")


def schema_version(path: Path) -> int:
    """Schema version of the file. Raises StoreError if it is not a SQLite database."""
    try:
        with closing(connect(path)) as db:
            return db.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.Error as error:
        raise store_error(f"the store {path} cannot be read", error) from error


def remove_if_empty(path: Path) -> None:
    """Delete the file unless one of its tables has a row; that of its clock and that of SQLite always have."""
    with closing(connect(path)) as db:
        found = db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        tables = [name for (name,) in found if name not in ("clock", "sqlite_sequence")]
        is_empty = not any(db.execute(f'SELECT 1 FROM "{name}" LIMIT 1').fetchone() for name in tables)
    if is_empty:
        for file in (path, *(path.with_name(f"{path.name}-{part}") for part in ("wal", "shm"))):
            file.unlink(missing_ok=True)


def backup(path: Path, target: Path) -> None:
    """Copy a consistent snapshot of the store to `target`, while others may write; returns once it is on disk.

    Raises StoreError if that fails or `target` exists, DamageError if the store is damaged.
    """
    if target.exists():
        raise StoreError(f"{target} is there already; name a new file")
    partial = target.with_name(f"{target.name}.part")
    try:
        with closing(connect(path)) as source, closing(sqlite3.connect(partial)) as copy:
            source.backup(copy)  # All pages in one step: in several steps any write restarts the backup.
        if damage := check(partial):
            raise DamageError(
                f"the store {path} is damaged, and not backed up ({'; '.join(damage[:3])}): restore an earlier backup, "
                "or keep what is sound with `agl store repair`"
            )
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        partial.rename(target)
    except sqlite3.Error as error:
        raise store_error(f"cannot back up the store {path} to {target}", error) from error
    except OSError as error:
        raise StoreError(f"cannot back up the store {path} to {target}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
