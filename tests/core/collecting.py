"""The whole collector on free ports of loopback, with a store that fails on request."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from agl.config import CollectorConfig
from agl.errors import InputError, StoreError
from agl.server.auth import BearerTokens
from agl.server_thread import ServerThread
from agl.store import open_store
from agl.store.span_row import SpanRow


class RefusingStore:
    """The real store at `uri`: it refuses the next `refusals` requests, and commits only while `open` is set.

    `arrived` counts the requests that got so far.
    """

    def __init__(self, uri: str) -> None:
        self.refusals = 0
        self.refuses_for_good = False
        self.open = threading.Event()
        self.open.set()
        self.arrived = threading.Semaphore(0)
        self._store = open_store(uri)

    def append_rows(self, rows: Sequence[SpanRow]) -> int:
        if self.refusals:
            self.refusals -= 1
            raise StoreError("the disk is full")
        if self.refuses_for_good:
            raise InputError("nobody can keep that")
        self.arrived.release()
        self.open.wait(30)
        return self._store.append_rows(rows)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@contextmanager
def collecting(*tokens: str, uri: str = "memory://", **config: Any) -> Iterator[tuple[RefusingStore, ServerThread]]:
    """HTTP and gRPC receivers with these tokens and settings of `CollectorConfig`."""
    store = RefusingStore(uri)
    with ServerThread(
        store,
        port=0,
        otlp_http_port=0,
        otlp_grpc_port=0,
        tokens=BearerTokens(tokens),
        collector=CollectorConfig(**config),
    ) as server:
        yield store, server
        store.open.set()
    store.close()
