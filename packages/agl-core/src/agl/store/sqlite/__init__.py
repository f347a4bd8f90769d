"""The default store: one SQLite file, or memory."""

from agl.store.sqlite.store import SqliteStore

__all__ = ["SqliteStore"]
