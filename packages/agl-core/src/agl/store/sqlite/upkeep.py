"""Looking after a store's file from outside, whoever else has it open: check it, back it up."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from agl.errors import StoreError
from agl.store.sqlite.database import connect, say

_MOST_FINDINGS = 20


def check(path: Path) -> list[str]:
    """What is wrong with the file, each as a line; empty where nothing is. It reads all of it."""
    try:
        with closing(connect(path)) as db:
            found = [line for (line,) in db.execute(f"PRAGMA quick_check({_MOST_FINDINGS})")]
    except sqlite3.Error as error:
        return [str(error)]
    return [] if found == ["ok"] else found


def schema_version(path: Path) -> int:
    """Version of the schema that the file has. Raises StoreError where it is no database."""
    try:
        with closing(connect(path)) as db:
            return db.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.Error as error:
        raise StoreError(f"the store {path} cannot be read: {say(error)}") from error


def backup(path: Path, target: Path) -> None:
    """Copy the store as it is at one moment to `target`, while others go on writing. The copy is on disk then.

    Raises StoreError where that cannot be done, or `target` is there.
    """
    if target.exists():
        raise StoreError(f"{target} is there already; name a new file")
    partial = target.with_name(f"{target.name}.part")
    try:
        with closing(connect(path)) as source, closing(sqlite3.connect(partial)) as copy:
            source.backup(copy)  # All pages in one go: in steps it would start again whenever somebody writes.
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        partial.rename(target)
    except (sqlite3.Error, OSError) as error:
        partial.unlink(missing_ok=True)
        reason = say(error) if isinstance(error, sqlite3.Error) else error
        raise StoreError(f"cannot back up the store {path} to {target}: {reason}") from error
