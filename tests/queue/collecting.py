"""A collector with a queue, and numbered spans for it."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

from agl.config import QueueConfig
from agl.queue import SpanQueue, WriterPool
from agl.server_thread import ServerThread
from agl.span import Span
from agl.store import Store, open_store
from agl.store.span_row import SpanRow

TRACE = "a" * 32


def make_spans(first: int, count: int) -> list[Span]:
    return [Span(TRACE, f"{n:016x}", None, "chat", n, n + 1, {"n": n}) for n in range(first, first + count)]


def make_rows(first: int, count: int) -> list[SpanRow]:
    return [SpanRow.of(span) for span in make_spans(first, count)]


def numbers_in(store: Store) -> list[int]:
    """The numbers of the stored spans, sorted, duplicates included."""
    return sorted(int(span.span_id, 16) for span in store.query_spans(TRACE))


@contextmanager
def collecting(
    queue_uri: str, store_uri: str, config: QueueConfig
) -> Iterator[tuple[SpanQueue, WriterPool, ServerThread, Store]]:
    """The parts that `agl serve --queue` runs."""
    with (
        closing(open_store(store_uri)) as store,
        closing(SpanQueue(queue_uri, config)) as queue,
        WriterPool(queue, store_uri, config) as pool,
        ServerThread(store, port=0, otlp_http_port=0, queue=queue) as server,
    ):
        yield queue, pool, server, store
