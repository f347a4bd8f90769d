"""Check, back up and remove the file of a store, also while other processes have it open."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from agl.errors import StoreError
from agl.store.sqlite.database import connect, describe

_MAX_FINDINGS = 20


def check(path: Path) -> list[str]:
    """Errors in the file, one a line; reads the whole file."""
    try:
        with closing(connect(path)) as db:
            found = [line for (line,) in db.execute(f"PRAGMA quick_check({_MAX_FINDINGS})")]
    except sqlite3.Error as error:
        return [str(error)]
    return [] if found == ["ok"] else found


def schema_version(path: Path) -> int:
    """Schema version of the file. Raises StoreError if it is not a SQLite database."""
    try:
        with closing(connect(path)) as db:
            return db.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.Error as error:
        raise StoreError(f"the store {path} cannot be read: {describe(error)}") from error


def remove_if_empty(path: Path) -> None:
    """Delete the file unless one of its tables has a row."""
    with closing(connect(path)) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        is_empty = not any(db.execute(f'SELECT 1 FROM "{name}" LIMIT 1').fetchone() for name in tables)
    if is_empty:
        for file in (path, *(path.with_name(f"{path.name}-{part}") for part in ("wal", "shm"))):
            file.unlink(missing_ok=True)


def backup(path: Path, target: Path) -> None:
    """Copy a consistent snapshot of the store to `target`, while others may write; returns once it is on disk.

    Raises StoreError if that fails or `target` exists.
    """
    if target.exists():
        raise StoreError(f"{target} is there already; name a new file")
    partial = target.with_name(f"{target.name}.part")
    try:
        with closing(connect(path)) as source, closing(sqlite3.connect(partial)) as copy:
            source.backup(copy)  # All pages in one step: in several steps any write restarts the backup.
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        partial.rename(target)
    except (sqlite3.Error, OSError) as error:
        partial.unlink(missing_ok=True)
        reason = describe(error) if isinstance(error, sqlite3.Error) else error
        raise StoreError(f"cannot back up the store {path} to {target}: {reason}") from error
