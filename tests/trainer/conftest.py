"""A store with a real collector in front of it, to which this process exports."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.applications import Starlette

import agl
from agl.collector import Collector
from agl.server import AppThread
from agl.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A SQLite store that the spans of this process reach over OTLP/HTTP."""
    store = open_store(f"sqlite:///{tmp_path / 'agl.db'}")
    server = AppThread()
    url = server.add(Starlette(routes=Collector(store).routes()), name="collector")
    with server:
        agl.init(endpoint=url)
        yield store
        agl.shutdown()
    store.close()
