"""Counts how often a store is asked for spans or rollouts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from agl.store.sqlite.store import SqliteStore


@contextmanager
def counted_reads() -> Iterator[list[int]]:
    """The number of rollouts of each read of a SQLite store within the context."""
    reads: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("query_rows_by_rollout", "get_rollouts"):
            patch.setattr(SqliteStore, name, _counting(getattr(SqliteStore, name), reads))
        yield reads


def _counting(read: Callable[[SqliteStore, Sequence[str]], Any], reads: list[int]) -> Callable[..., Any]:
    def counted(store: SqliteStore, ids: Sequence[str]) -> Any:
        reads.append(len(ids))
        return read(store, ids)

    return counted
