"""OTLP/HTTP over loopback: raw bodies, and every rejection."""

import gzip
import json
import socket
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from agl import otlp, semconv
from agl.collector.http import JSON, PROTOBUF
from agl.server_thread import ServerThread
from agl.span import Span
from agl.store import open_store
from tests.core.collecting import RefusingStore, collecting

TRACE = "5b8efff798038103d269b633813fc60c"
LIMIT = 100_000


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[RefusingStore, str]]:
    with collecting(max_body_bytes=LIMIT) as (store, server):
        yield store, server.otlp_url


def make_spans(first: int, count: int = 1) -> list[Span]:
    return [Span(TRACE, f"{number:016x}", None, "chat", 1, 2) for number in range(first, first + count)]


def post(url: str, body: bytes | str, content_type: str = PROTOBUF, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"{url}/v1/traces", content=body, headers={"content-type": content_type} | named)


def test_success_means_stored_and_is_empty_in_the_encoding_of_the_request(server: tuple[RefusingStore, str]) -> None:
    store, url = server
    before = store.count_spans()
    answer = post(url, otlp.encode(make_spans(100, 2)))
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"", PROTOBUF)
    assert store.count_spans() == before + 2
    answer = post(url, otlp.encode_json(make_spans(101, 2)), "application/json; charset=utf-8")
    assert (answer.status_code, answer.json(), answer.headers["content-type"]) == (200, {}, JSON)
    assert store.count_spans() == before + 3


def test_gzipped_json_is_understood(server: tuple[RefusingStore, str]) -> None:
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
        (gzip.compress(otlp.encode(make_spans(300)), mtime=0)[:-4], "gzip", 400, "not one whole gzip stream"),
        (gzip.compress(b"", mtime=0) + b"more", "gzip", 400, "not one whole gzip stream"),
        (b"", "br", 415, "content encoding 'br'"),
        (b"x" * (LIMIT + 1), "identity", 413, f"over {LIMIT} bytes"),
        (gzip.compress(bytes(50_000_000)), "gzip", 413, f"over {LIMIT} bytes"),
        (zlib.compress(bytes(50_000_000)), "deflate", 413, f"over {LIMIT} bytes"),
    ],
)
def test_an_invalid_body_gets_a_status_in_protobuf(
    server: tuple[RefusingStore, str], body: bytes, encoding: str, status: int, message: str
) -> None:
    store, url = server
    before = store.count_spans()
    answer = post(url, body, content_encoding=encoding)
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROTOBUF)
    assert message in Status.FromString(answer.content).message
    assert "retry-after" not in answer.headers
    assert store.count_spans() == before


def test_invalid_json_gets_a_status_in_json(server: tuple[RefusingStore, str]) -> None:
    _, url = server
    answer = post(url, '{"resourceSpans": 7}', JSON)
    assert (answer.status_code, answer.headers["content-type"]) == (400, JSON)
    assert answer.json()["code"] == 3
    assert "not an OTLP/JSON trace request" in answer.json()["message"]


def test_other_content_types_are_named(server: tuple[RefusingStore, str]) -> None:
    _, url = server
    answer = post(url, b"x", "text/plain")
    assert answer.status_code == 415
    assert "content type 'text/plain'" in answer.json()["message"]


def test_a_store_error_asks_the_sender_to_retry(server: tuple[RefusingStore, str]) -> None:
    store, url = server
    store.refusals = 1
    answer = post(url, otlp.encode(make_spans(400)))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    status = Status.FromString(answer.content)
    assert (status.code, status.message) == (14, "the disk is full")
    assert post(url, otlp.encode(make_spans(400))).status_code == 200


def test_a_span_with_an_id_too_long_to_index_is_rejected_and_its_neighbours_are_kept(
    server: tuple[RefusingStore, str],
) -> None:
    store, url = server
    before = store.count_spans()
    odd = Span(TRACE, "f" * 16, None, "odd", 1, 2, {semconv.ROLLOUT_ID: "x" * 501})
    answer = post(url, otlp.encode([odd, *make_spans(900)]))
    partial = ExportTraceServiceResponse.FromString(answer.content).partial_success
    assert (answer.status_code, partial.rejected_spans, store.count_spans() - before) == (200, 1, 1)
    assert "501 characters, expected at most 500" in partial.error_message


def test_input_that_the_store_can_never_accept_is_rejected_without_retry(server: tuple[RefusingStore, str]) -> None:
    store, url = server
    store.refuses_for_good = True
    try:
        answer = post(url, otlp.encode(make_spans(950)))
    finally:
        store.refuses_for_good = False
    assert answer.status_code == 400
    assert "retry-after" not in answer.headers
    assert Status.FromString(answer.content).message == "nobody can keep that"


@pytest.mark.parametrize("signal", ["metrics", "logs"])
def test_other_signals_are_answered_with_success(server: tuple[RefusingStore, str], signal: str) -> None:
    _, url = server
    answer = httpx.post(f"{url}/v1/{signal}", content=b"\x0a\x00", headers={"content-type": PROTOBUF})
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"", PROTOBUF)
    answer = httpx.post(f"{url}/v1/{signal}", content=b"{}", headers={"content-type": JSON})
    assert (answer.status_code, answer.json()) == (200, {})


def test_a_sender_that_disconnects_within_a_body_stores_nothing(
    server: tuple[RefusingStore, str], caplog: pytest.LogCaptureFixture
) -> None:
    store, url = server
    before = store.count_spans()
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = (
            f"POST /v1/traces HTTP/1.1\r\nHost: localhost\r\nContent-Type: {PROTOBUF}\r\nContent-Length: 1000\r\n\r\n"
        )
        connection.sendall(head.encode() + b"\x0a\x01")
    assert post(url, otlp.encode(make_spans(600))).status_code == 200
    assert store.count_spans() == before + 1
    assert "Traceback" not in caplog.text


def test_acknowledged_spans_are_in_the_file(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/agl.db"
    store = open_store(uri)
    with ServerThread(store, port=0, otlp_http_port=0) as server:
        assert (
            post(server.otlp_url, json.dumps(json.loads(otlp.encode_json(make_spans(1, 3)))), JSON).status_code == 200
        )
        reader = open_store(uri)
        assert reader.count_spans() == 3
        reader.close()
    store.close()


def test_invalid_spans_are_a_partial_success(server: tuple[RefusingStore, str]) -> None:
    """The valid spans of the request are kept; repeating the request would not help the others."""
    store, url = server
    bad, good = Span(TRACE, "00" * 8, None, "chat", 1, 2), *make_spans(7000)
    before = store.count_spans()
    answer = post(url, otlp.encode([bad, good]))
    partial = ExportTraceServiceResponse.FromString(answer.content).partial_success
    assert (answer.status_code, partial.rejected_spans) == (200, 1)
    assert "span id" in partial.error_message
    assert store.count_spans() == before + 1
    assert good in store.query_spans(TRACE)


def as_json(spans: list[Span], **first: object) -> bytes:
    """An OTLP/JSON request; `first` replaces fields of the first span."""
    data = json.loads(otlp.encode_json(spans))
    data["resourceSpans"][0]["scopeSpans"][0]["spans"][0] |= first
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    "fields",
    [
        {"spanId": "not hex"},
        {"traceId": 7},
        {"parentSpanId": "abc"},
        {"links": [{"traceId": "zz"}]},
        {"name": "\ud800"},
        {"attributes": [{"key": "\udfff", "value": {"stringValue": "x"}}]},
        {"attributes": [{"key": "x", "value": {"stringValue": "\ud800"}}]},
        {"attributes": [{"key": "x", "value": {"intValue": str(2**64)}}]},
        {"attributes": "none"},
        {"startTimeUnixNano": -1},
        {"startTimeUnixNano": str(2**70)},
        {"events": [{"timeUnixNano": "soon"}]},
    ],
)
def test_a_span_that_json_cannot_express_is_rejected_alone(
    server: tuple[RefusingStore, str], fields: dict[str, object]
) -> None:
    store, url = server
    before = store.count_spans()
    number = before + 10_000
    answer = post(url, as_json(make_spans(number, 3), **fields), JSON)
    assert answer.status_code == 200
    partial = answer.json()["partialSuccess"]
    assert (partial["rejectedSpans"], bool(partial["errorMessage"])) == ("1", True)
    assert store.count_spans() == before + 2
    alone = post(url, as_json(make_spans(number + 5), **fields), JSON)
    assert (alone.status_code, store.count_spans()) == (400, before + 2)


def test_the_spans_of_an_invalid_resource_are_rejected_and_no_others(server: tuple[RefusingStore, str]) -> None:
    store, url = server
    before = store.count_spans()
    data = json.loads(as_json(make_spans(20_000, 2)))
    bad = json.loads(as_json(make_spans(20_010, 3)))["resourceSpans"][0]
    bad["resource"] = {"attributes": [{"key": "x", "value": {"intValue": str(2**64)}}]}
    answer = post(url, json.dumps({"resourceSpans": [bad, *data["resourceSpans"]]}), JSON)
    assert (answer.status_code, answer.json()["partialSuccess"]["rejectedSpans"]) == (200, "3")
    assert store.count_spans() == before + 2


@pytest.mark.parametrize("body", ["[]", "null", '{"resourceSpans": 3}', '{"resourceSpans": [3]}', "[" * 100_000])
def test_json_without_the_form_of_a_request_is_an_error(server: tuple[RefusingStore, str], body: str) -> None:
    assert post(server[1], body, JSON).status_code == 400


@pytest.mark.parametrize("count", [1, 20_000])
def test_a_span_that_protobuf_cannot_parse_is_rejected_alone(count: int) -> None:
    with collecting() as (store, collector):
        good = make_spans(30_000, count)
        name = b"name that is not UTF-8"
        bad = otlp.encode([Span(TRACE, "f" * 16, None, name.decode(), 1, 2)]).replace(name, b"\xff" * len(name))
        answer = post(collector.otlp_url, bad + otlp.encode(good))
        partial = ExportTraceServiceResponse.FromString(answer.content).partial_success
        assert (answer.status_code, partial.rejected_spans, store.count_spans()) == (200, 1, count)


def test_a_retryable_rejection_has_retry_info_in_json_too(server: tuple[RefusingStore, str]) -> None:
    store, url = server
    store.refusals = 1
    answer = post(url, otlp.encode_json(make_spans(800)), JSON)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["details"] == [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "1s"}]


def test_an_endpoint_that_has_the_path_already_works(server: tuple[RefusingStore, str]) -> None:
    store, url = server
    before = store.count_spans()
    assert post(f"{url}/v1/traces", otlp.encode(make_spans(5100))).status_code == 200
    assert store.count_spans() == before + 1


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/traces", 405), ("POST", "/v1/trace", 404)])
def test_other_paths_and_methods_are_named(
    server: tuple[RefusingStore, str], method: str, path: str, status: int
) -> None:
    _, url = server
    answer = httpx.request(method, url + path)
    assert (answer.status_code, path in answer.json()["message"]) == (status, True)


@contextmanager
def head_only(url: str, *lines: str) -> Iterator[socket.socket]:
    """A connection on which only the head of a request was sent."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        head = ["POST /v1/traces HTTP/1.1", "Host: localhost", f"Content-Type: {PROTOBUF}", *lines]
        connection.sendall("\r\n".join([*head, "", ""]).encode())
        yield connection


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ([f"Content-Length: {LIMIT + 1}"], 413),
        (["Content-Length: 1000", "Content-Encoding: br"], 415),
        (["Content-Length: 1000", "Expect: 100-continue", "Content-Type: text/plain"], 415),
    ],
)
def test_a_request_with_invalid_headers_is_rejected_before_the_body_is_read(
    server: tuple[RefusingStore, str], lines: list[str], status: int
) -> None:
    _, url = server
    with head_only(url, *lines) as connection:
        assert connection.recv(1000).startswith(f"HTTP/1.1 {status} ".encode())


def test_senders_without_a_token_are_rejected_before_the_body_is_read() -> None:
    with collecting("secret") as (_, server):
        with head_only(server.otlp_url, "Content-Length: 1000") as connection:
            answer = connection.recv(1000)
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"\r\nwww-authenticate: Bearer\r\n" in answer
        assert post(server.otlp_url, otlp.encode(make_spans(1)), authorization="Bearer secret").status_code == 200


def test_over_the_limit_of_pending_bytes_senders_are_asked_to_retry() -> None:
    """Bodies count that have arrived, until they are committed."""
    half, plain = (otlp.encode([Span(TRACE, f"{n:016x}", None, "x" * 90_000, 1, 2)]) for n in (1, 2))
    with collecting(max_body_bytes=LIMIT, max_pending_bytes=2 * LIMIT) as (store, server), ThreadPoolExecutor() as pool:
        store.open.clear()
        first = pool.submit(post, server.otlp_url, half)
        assert store.arrived.acquire(timeout=20)
        answer = post(server.otlp_url, gzip.compress(plain, 0), content_encoding="gzip")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "no memory for this body until other requests are done" in Status.FromString(answer.content).message
        second = pool.submit(post, server.otlp_url, plain)
        assert store.arrived.acquire(timeout=20)
        assert post(server.otlp_url, half).status_code == 503
        store.open.set()
        assert {first.result().status_code, second.result().status_code} == {200}
        assert post(server.otlp_url, gzip.compress(plain), content_encoding="gzip").status_code == 200
        assert store.count_spans() == 2
