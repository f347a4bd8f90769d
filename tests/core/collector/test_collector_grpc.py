"""OTLP/gRPC over loopback: raw messages, and every rejection."""

import gzip
import logging
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from agl import otlp
from agl.server_thread import ServerThread
from agl.span import Span
from agl.store import open_store
from tests.core.collecting import RefusingStore, collecting

TRACE = "5b8efff798038103d269b633813fc60c"
LIMIT = 100_000
EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"

Running = tuple[RefusingStore, grpc.Channel]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with collecting(max_body_bytes=LIMIT) as (store, server), dial(server) as channel:
        yield store, channel


def dial(server: ServerThread) -> grpc.Channel:
    assert server.otlp_grpc_url is not None
    return grpc.insecure_channel(server.otlp_grpc_url.removeprefix("http://"))


def make_spans(first: int, count: int = 1) -> list[Span]:
    return [Span(TRACE, f"{number:016x}", None, "chat", 1, 2) for number in range(first, first + count)]


def send(channel: grpc.Channel, message: bytes, method: str = EXPORT, **options: Any) -> bytes:
    return channel.unary_unary(method)(message, timeout=10, **options)


def refused(channel: grpc.Channel, message: bytes, **options: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        send(channel, message, **options)
    return caught.value


def details(error: Any) -> Status:
    (status,) = (value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin")
    return Status.FromString(status)


@pytest.mark.parametrize("compression", list(grpc.Compression))
def test_success_means_stored_and_is_empty(running: Running, compression: grpc.Compression) -> None:
    store, channel = running
    before = store.count_spans()
    spans = make_spans(100 + 10 * compression.value, 5)
    assert send(channel, otlp.encode(spans), compression=compression) == b""
    assert store.count_spans() == before + 5


CUT_GZIP = gzip.compress(otlp.encode(make_spans(1)), mtime=0)[:-4]


@pytest.mark.parametrize(
    ("message", "code", "expected"),
    [
        (b"\x0a\xff\xff", grpc.StatusCode.INVALID_ARGUMENT, "not a protobuf"),
        (b"\x1f\x8bnot gzip", grpc.StatusCode.INVALID_ARGUMENT, "not valid gzip"),
        (CUT_GZIP, grpc.StatusCode.INVALID_ARGUMENT, "not one whole gzip"),
        (gzip.compress(bytes(50_000_000)), grpc.StatusCode.INVALID_ARGUMENT, f"over {LIMIT} bytes"),
        (zlib.compress(bytes(50_000_000)), grpc.StatusCode.INVALID_ARGUMENT, f"over {LIMIT} bytes"),
    ],
)
def test_an_invalid_message_is_rejected_without_retry(
    running: Running, message: bytes, code: grpc.StatusCode, expected: str
) -> None:
    store, channel = running
    before = store.count_spans()
    error = refused(channel, message)
    assert (error.code(), details(error).code) == (code, code.value[0])
    assert expected in error.details() and expected in details(error).message
    assert not details(error).details
    assert store.count_spans() == before


def test_a_message_over_the_limit_is_rejected_before_it_is_read(running: Running) -> None:
    _, channel = running
    error = refused(channel, bytes(LIMIT + 1))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"({LIMIT + 1} vs. {LIMIT})" in error.details()


def test_a_store_error_asks_the_sender_to_retry(running: Running) -> None:
    store, channel = running
    store.refusals = 1
    error = refused(channel, otlp.encode(make_spans(400)))
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "the disk is full")
    info = RetryInfo()
    assert details(error).details[0].Unpack(info)
    assert info.retry_delay == Duration(seconds=1)
    assert send(channel, otlp.encode(make_spans(400))) == b""


def test_invalid_spans_are_a_partial_success(running: Running) -> None:
    store, channel = running
    before = store.count_spans()
    bad = Span(TRACE, "00" * 8, None, "n" * 60_000, 1, 2)
    partial = ExportTraceServiceResponse.FromString(send(channel, otlp.encode([bad, *make_spans(500)]))).partial_success
    assert partial.rejected_spans == 1
    assert len(partial.error_message) == 500
    assert store.count_spans() == before + 1
    # A status travels in a header, which may not be long.
    assert refused(channel, otlp.encode([bad])).code() is grpc.StatusCode.INVALID_ARGUMENT


def test_other_methods_are_unimplemented(running: Running) -> None:
    _, channel = running
    assert refused(channel, b"", method="/a.b.C/Export").code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_sender_without_a_token_is_rejected_before_its_message_is_read() -> None:
    """It sends no message, and is rejected immediately."""
    with collecting("secret") as (_, server), dial(server) as channel:
        silent: Iterator[bytes] = iter(threading.Event().wait, True)
        begin = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            channel.stream_unary(EXPORT)(silent, timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert time.monotonic() - begin < 4
        assert send(channel, b"", metadata=[("authorization", "bearer secret")]) == b""


def test_over_the_limit_of_pending_bytes_senders_are_asked_to_retry() -> None:
    with collecting(max_body_bytes=LIMIT, max_pending_bytes=2 * LIMIT) as (store, server), dial(server) as channel:
        store.open.clear()
        big = [otlp.encode([Span(TRACE, f"{n:016x}", None, "x" * 90_000, 1, 2)]) for n in range(1, 4)]
        waiting = [channel.unary_unary(EXPORT).future(message, timeout=30) for message in big[:2]]
        assert all(store.arrived.acquire(timeout=20) for _ in waiting)
        error = refused(channel, big[2])
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "no memory for this body" in error.details()
        assert details(error).details[0].Is(RetryInfo.DESCRIPTOR)
        store.open.set()
        assert [call.result() for call in waiting] == [b"", b""]
        assert send(channel, big[2]) == b""
        assert store.count_spans() == 3


def test_requests_in_progress_finish_when_the_server_stops() -> None:
    store = open_store("memory://")
    entered, leave = threading.Event(), threading.Event()
    others = set(threading.enumerate())

    class Slow:
        def append_rows(self, rows: Sequence[Any]) -> int:
            entered.set()
            leave.wait(5)
            return store.append_rows(rows)

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

    server = ServerThread(Slow(), port=0, otlp_http_port=0, otlp_grpc_port=0)
    server.start()
    with dial(server) as channel:
        answer = channel.unary_unary(EXPORT).future(otlp.encode(make_spans(1)), timeout=10)
        assert entered.wait(5)
        threading.Timer(0.2, leave.set).start()
        server.stop()
        assert answer.result() == b""
    assert store.count_spans() == 1
    assert not [thread for thread in set(threading.enumerate()) - others if thread.name.startswith("agl-otlp")]
    store.close()


def test_a_sender_that_disconnects_logs_nothing(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    store, channel = running
    before = store.count_spans()
    silent: Iterator[bytes] = iter(threading.Event().wait, True)
    call = channel.stream_unary(EXPORT).future(silent)
    time.sleep(0.2)
    call.cancel()
    assert send(channel, otlp.encode(make_spans(900))) == b""
    assert store.count_spans() == before + 1
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
