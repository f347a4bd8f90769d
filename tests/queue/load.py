"""A load of spans on a collector with a queue, counted: what was sent, acknowledged and found."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import httpx

from agl import otlp
from agl.collector.http import PROTOBUF
from agl.config import QueueConfig
from agl.queue import SpanQueue, WriterPool
from agl.server import ServerThread
from agl.span import Span
from agl.store import Store, open_store
from agl.store.row import SpanRow
from tests.queue.redis_server import wait_until

TRACE = "a" * 32


def make_spans(first: int, count: int) -> list[Span]:
    return [Span(TRACE, f"{n:016x}", None, "chat", n, n + 1, {"n": n}) for n in range(first, first + count)]


def make_rows(first: int, count: int) -> list[SpanRow]:
    return [SpanRow.of(span) for span in make_spans(first, count)]


def numbers_in(store: Store) -> list[int]:
    """What `make_spans` was given, sorted; one that is there twice stands there twice."""
    return sorted(int(span.span_id, 16) for span in store.query_spans(TRACE))


@contextmanager
def collecting(
    queue_uri: str, store_uri: str, config: QueueConfig
) -> Iterator[tuple[SpanQueue, WriterPool, ServerThread, Store]]:
    """What `agl serve --queue` runs."""
    with (
        closing(open_store(store_uri)) as store,
        closing(SpanQueue(queue_uri, config)) as queue,
        WriterPool(queue, store_uri, config) as pool,
        ServerThread(store, port=0, otlp_http_port=0, queue=queue) as server,
    ):
        yield queue, pool, server, store


class Load(threading.Thread):
    """Sends `batches` requests of `size` spans, each again until it is acknowledged, as exporters do."""

    def __init__(self, url: str, batches: int, size: int) -> None:
        super().__init__()
        self.sent = 0
        """Spans, those that were sent again counted again."""
        self.acknowledged: list[int] = []
        self._url = f"{url}/v1/traces"
        self._batches = [make_spans(first, size) for first in range(1, batches * size + 1, size)]
        self._ended = threading.Event()

    def run(self) -> None:
        with httpx.Client(headers={"content-type": PROTOBUF}, timeout=30) as client:
            for batch in self._batches:
                while not self._send(client, batch):
                    self._ended.wait(0.1)

    def wait_for(self, acknowledged: int) -> None:
        wait_until(lambda: len(self.acknowledged) >= acknowledged)

    def _send(self, client: httpx.Client, batch: Sequence[Span]) -> bool:
        self.sent += len(batch)
        answer = client.post(self._url, content=otlp.encode(batch))
        assert answer.status_code in (200, 503), answer.text
        if answer.status_code == 200:
            self.acknowledged += [int(span.span_id, 16) for span in batch]
        return answer.status_code == 200
