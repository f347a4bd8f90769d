"""Versions of a store's schema."""

from agl.errors import StoreError

Migrations = tuple[tuple[str, ...], ...]
"""Entry n has the statements that migrate a schema of version n to version n + 1; version 0 is an empty database."""


def pending_statements(name: str, version: int, migrations: Migrations) -> list[str]:
    """Statements that migrate the store `name` from `version`. Raises StoreError if this program is too old for it."""
    known = len(migrations)
    if version > known:
        raise StoreError(f"{name} has schema version {version}, this program knows up to {known}; update agl-core")
    return [statement for statements in migrations[version:] for statement in statements]
