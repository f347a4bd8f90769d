"""The OTLP/HTTP receiver over loopback: the SDK's own exporter, raw bodies, and every refusal."""

import gzip
import json
import socket
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from google.rpc.status_pb2 import Status
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from starlette.applications import Starlette

from agl import otlp
from agl.collector import JSON, PROTOBUF, Collector
from agl.errors import StoreError
from agl.server import AppThread
from agl.span import Span
from agl.store import open_store
from agl.store.sqlite import SqliteStore

TRACE = "5b8efff798038103d269b633813fc60c"
LIMIT = 100_000


class Store(SqliteStore):
    """The real store in memory, which can be told to refuse the next requests."""

    refusals = 0

    def append_spans(self, spans: Sequence[Span]) -> int:
        if self.refusals:
            self.refusals -= 1
            raise StoreError("the disk is full")
        return super().append_spans(spans)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Store, str]]:
    store = Store(":memory:", uri="memory://")
    thread = AppThread()
    url = thread.add(Starlette(routes=Collector(store, max_body_bytes=LIMIT).routes()))
    with thread:
        yield store, url
    store.close()


def make_spans(first: int, count: int = 1) -> list[Span]:
    return [Span(TRACE, f"{number:016x}", None, "chat", 1, 2) for number in range(first, first + count)]


def post(url: str, body: bytes | str, content_type: str = PROTOBUF, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"{url}/v1/traces", content=body, headers={"content-type": content_type} | named)


@pytest.mark.parametrize("compression", [Compression.NoCompression, Compression.Gzip, Compression.Deflate])
def test_the_sdk_exporter_is_understood(server: tuple[Store, str], compression: Compression) -> None:
    store, url = server
    provider = TracerProvider()
    exporter = OTLPSpanExporter(endpoint=f"{url}/v1/traces", compression=compression)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with provider.get_tracer("scope").start_as_current_span("run", attributes={"ids": b"\x01\x00"}) as span:
        trace_id = f"{span.get_span_context().trace_id:032x}"
    provider.shutdown()
    (found,) = store.query_spans(trace_id)
    assert (found.name, found.attributes, found.scope) == ("run", {"ids": b"\x01\x00"}, "scope")


def test_success_means_stored_and_is_empty_in_the_encoding_of_the_request(server: tuple[Store, str]) -> None:
    store, url = server
    before = store.count_spans()
    answer = post(url, otlp.encode(make_spans(100, 2)))
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"", PROTOBUF)
    assert store.count_spans() == before + 2
    answer = post(url, otlp.encode_json(make_spans(101, 2)), "application/json; charset=utf-8")
    assert (answer.status_code, answer.json(), answer.headers["content-type"]) == (200, {}, JSON)
    assert store.count_spans() == before + 3


def test_gzipped_json_is_understood(server: tuple[Store, str]) -> None:
    store, url = server
    before = store.count_spans()
    answer = post(url, gzip.compress(otlp.encode_json(make_spans(200)).encode()), JSON, content_encoding="gzip")
    assert answer.status_code == 200
    assert store.count_spans() == before + 1


@pytest.mark.parametrize(
    ("body", "encoding", "status", "message"),
    [
        (b"\x0a\xff\xff", "identity", 400, "not a protobuf"),
        (b"not gzip", "gzip", 400, "not valid gzip"),
        (gzip.compress(otlp.encode(make_spans(300)))[:-4], "gzip", 400, "not one whole gzip stream"),
        (gzip.compress(b"") + b"more", "gzip", 400, "not one whole gzip stream"),
        (b"", "br", 415, "content encoding 'br'"),
        (b"x" * (LIMIT + 1), "identity", 413, f"over {LIMIT} bytes"),
        (gzip.compress(bytes(50_000_000)), "gzip", 413, f"over {LIMIT} bytes"),
        (zlib.compress(bytes(50_000_000)), "deflate", 413, f"over {LIMIT} bytes"),
    ],
)
def test_a_bad_body_gets_a_status_in_protobuf(
    server: tuple[Store, str], body: bytes, encoding: str, status: int, message: str
) -> None:
    store, url = server
    before = store.count_spans()
    answer = post(url, body, content_encoding=encoding)
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROTOBUF)
    assert message in Status.FromString(answer.content).message
    assert "retry-after" not in answer.headers
    assert store.count_spans() == before


def test_bad_json_gets_a_status_in_json(server: tuple[Store, str]) -> None:
    _, url = server
    answer = post(url, '{"resourceSpans": 7}', JSON)
    assert (answer.status_code, answer.headers["content-type"]) == (400, JSON)
    assert answer.json()["code"] == 3
    assert "not an OTLP/JSON trace request" in answer.json()["message"]


def test_other_content_types_are_named(server: tuple[Store, str]) -> None:
    _, url = server
    answer = post(url, b"x", "text/plain")
    assert answer.status_code == 415
    assert "content type 'text/plain'" in answer.json()["message"]


def test_a_store_that_refuses_asks_the_sender_to_retry(server: tuple[Store, str]) -> None:
    store, url = server
    store.refusals = 1
    answer = post(url, otlp.encode(make_spans(400)))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    status = Status.FromString(answer.content)
    assert (status.code, status.message) == (14, "the disk is full")
    assert post(url, otlp.encode(make_spans(400))).status_code == 200


def test_the_sdk_exporter_delivers_after_a_refusal(server: tuple[Store, str]) -> None:
    store, url = server
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=f"{url}/v1/traces")))
    store.refusals = 1
    span = provider.get_tracer("scope").start_span("retried")
    span.end()
    provider.shutdown()
    assert store.refusals == 0
    assert len(store.query_spans(f"{span.get_span_context().trace_id:032x}")) == 1


@pytest.mark.parametrize("signal", ["metrics", "logs"])
def test_other_signals_are_answered_politely(server: tuple[Store, str], signal: str) -> None:
    _, url = server
    answer = httpx.post(f"{url}/v1/{signal}", content=b"\x0a\x00", headers={"content-type": PROTOBUF})
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"", PROTOBUF)
    answer = httpx.post(f"{url}/v1/{signal}", content=b"{}", headers={"content-type": JSON})
    assert (answer.status_code, answer.json()) == (200, {})


def test_a_sender_that_goes_away_half_way_leaves_nothing(
    server: tuple[Store, str], caplog: pytest.LogCaptureFixture
) -> None:
    store, url = server
    before = store.count_spans()
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/traces HTTP/1.1\r\nHost: x\r\nContent-Type: {PROTOBUF}\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head.encode() + b"\x0a\x01")
    assert post(url, otlp.encode(make_spans(600))).status_code == 200
    assert store.count_spans() == before + 1
    assert "Traceback" not in caplog.text


def test_acknowledged_spans_are_in_the_file(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/agl.db"
    store = open_store(uri)
    thread = AppThread()
    url = thread.add(Starlette(routes=Collector(store).routes()))
    with thread:
        assert post(url, json.dumps(json.loads(otlp.encode_json(make_spans(1, 3)))), JSON).status_code == 200
        reader = open_store(uri)
        assert reader.count_spans() == 3
        reader.close()
    store.close()
