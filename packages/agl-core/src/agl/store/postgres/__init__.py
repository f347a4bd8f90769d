"""The store for many machines: one PostgreSQL database."""

from agl.store.postgres.store import PostgresStore

__all__ = ["PostgresStore"]
