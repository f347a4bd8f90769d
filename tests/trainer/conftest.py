"""A store with a real collector, to which this process exports its spans."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import agl
from agl.collector import HttpReceiver, Receiver
from agl.config.section import DEFAULT_PROJECT
from agl.server.app_thread import AppThread
from agl.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A SQLite store that receives the spans of this process over OTLP/HTTP."""
    store = open_store(f"sqlite:///{tmp_path / 'agl.db'}")
    server = AppThread()
    receiver = HttpReceiver(Receiver({DEFAULT_PROJECT: store}))
    url = server.add(receiver, name="collector")
    with server:
        agl.init(endpoint=url)
        yield store
        agl.shutdown()
    receiver.close()
    store.close()
