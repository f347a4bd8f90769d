"""Stores: one protocol, one class for each backend, opened by URI."""

from agl.errors import StoreError
from agl.store.protocol import Attempt, Resource, Rollout, Store
from agl.store.states import AttemptState, RolloutState

__all__ = ["Attempt", "AttemptState", "Resource", "Rollout", "RolloutState", "Store", "open_store"]


def open_store(uri: str) -> Store:
    """Open the store at `uri` (`sqlite:///path.db`, `memory://`), made if it is not there.

    Raises StoreError for a scheme that is not known or a file that is not a store.
    """
    scheme, _, path = uri.partition("://")
    if scheme == "sqlite":
        from agl.store.sqlite import SqliteStore

        return SqliteStore(path.removeprefix("/"), uri=uri)
    if scheme == "memory":
        from agl.store.sqlite import SqliteStore

        return SqliteStore(":memory:", uri=uri)
    raise StoreError(f"store URI {uri!r} has the scheme {scheme!r}; known are sqlite:///path.db and memory://")
