"""Peers that claim, stall or say nothing, each beside a good sender on every port, who must not notice them."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from ssl import SSLContext, create_default_context
from typing import Any

import grpc
import pytest
import trustme

from agl import otlp
from agl.collector import grpc as grpc_receiver
from agl.collector.http import PROTOBUF
from agl.config import CollectorConfig, GatewayConfig, TlsConfig
from agl.server import app_thread, protocol, receiving, tls
from agl.server.api_error import ApiError
from agl.server.auth import BearerTokens
from agl.server.receiving import MemoryBudget, Reservation
from agl.server_thread import ServerThread
from agl.span import Span
from agl.store import open_store
from tests.core.collector.test_collector_grpc import EXPORT, dial
from tests.core.fake_engine import FakeEngine
from tests.waiting import wait_until

TOKEN = {"authorization": "Bearer secret"}
BODY = otlp.encode([Span("a" * 32, "b" * 16, None, "chat", 1, 2)])
CHAT = b'{"model": "base", "messages": [{"role": "user", "content": "hi"}]}'
JSON = "application/json"
MB = 2**20
REQUESTS = 10


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    """A server with a limit of 60 connections, and room for two large bodies at each part."""
    store, patch = open_store("memory://"), pytest.MonkeyPatch()
    patch.setattr(app_thread, "max_connections", lambda: 60)
    limits: dict[str, Any] = {"max_body_bytes": 4 * MB, "max_pending_bytes": 8 * MB}
    with ServerThread(
        store,
        port=0,
        otlp_http_port=0,
        otlp_grpc_port=0,
        upstream=FakeEngine().app,
        tokens=BearerTokens(["secret"]),
        collector=CollectorConfig(**limits),
        gateway=GatewayConfig(**limits),
    ) as server:
        yield server
    patch.undo()
    store.close()


@contextmanager
def connected(url: str, number: int, sent: bytes) -> Iterator[list[socket.socket]]:
    """Connections on which `sent` was sent, as far as the server reads it."""
    host, port = url.removeprefix("http://").split(":")
    with ExitStack() as stack:
        opened = []
        for _ in range(number):
            opened.append(stack.enter_context(socket.create_connection((host, int(port)), timeout=10)))
            opened[-1].settimeout(0.5)
            with suppress(OSError):  # Refused already.
                opened[-1].sendall(sent)
        yield opened


def head(path: str, size: int, content_type: str = PROTOBUF, token: str = "secret") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {size}\r\n\r\n"
    ).encode()


@contextmanager
def silent_streams(server: ServerThread) -> Iterator[None]:
    """gRPC streams without a message, on two connections."""
    ended = threading.Event()
    silent: Callable[[], Iterator[bytes]] = lambda: (b"" for _ in iter(ended.wait, True))  # noqa: E731
    address, own = str(server.otlp_grpc_url).removeprefix("http://"), [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, own) as one, grpc.insecure_channel(address, own) as other:
        calls: list[Any] = [
            channel.stream_unary(EXPORT).future(silent(), metadata=(*TOKEN.items(),)) for channel in (one, other) * 50
        ]
        yield
        for call in calls:
            call.cancel()
        ended.set()


@contextmanager
def idle_after_early_responses(server: ServerThread) -> Iterator[None]:
    """Connections that sent the end of a body after its response, and then nothing."""
    with connected(server.base_url, 80, head("/api/v1/append_spans", 1, token="wrong")) as opened:
        for connection in opened:
            with suppress(OSError):  # Closed already.
                connection.recv(4096)
                connection.sendall(b"x")
        yield


PEERS: dict[str, Callable[[ServerThread], Any]] = {
    "claims": lambda server: connected(server.otlp_url, 2, head("/v1/traces", 4 * MB)),
    "stalled spans": lambda server: connected(server.otlp_url, 3, head("/v1/traces", 4 * MB) + bytes(4 * MB - 1)),
    "stalled API": lambda server: connected(
        server.base_url, 3, head("/api/v1/append_spans", 4 * MB) + bytes(4 * MB - 1)
    ),
    "stalled calls": lambda server: connected(
        server.base_url, 3, head("/v1/chat/completions", 4 * MB, JSON) + b" " * (4 * MB - 1)
    ),
    "stalled control": lambda server: connected(
        server.base_url, 3, head("/api/gateway/pause", 4 * MB, JSON) + b" " * (4 * MB - 1)
    ),
    "half heads": lambda server: connected(server.base_url, 80, b"GET /api/health HTTP/1.1\r\nX: "),
    "half heads of spans": lambda server: connected(server.otlp_url, 80, b"POST /v1/traces HTTP/1.1\r\nX: "),
    "no heads": lambda server: connected(server.base_url, 80, b""),
    "idle after early responses": idle_after_early_responses,
    "silent streams": silent_streams,
}


@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
def test_a_good_sender_does_not_notice_a_bad_peer(server: ServerThread, peer: Callable[[ServerThread], Any]) -> None:
    times: list[float] = []

    def post(url: str, body: bytes, content_type: str) -> None:
        begin = time.monotonic()
        connection = HTTPConnection(url.split("/")[2], timeout=30)
        connection.request("POST", "/" + url.split("/", 3)[3], body, TOKEN | {"content-type": content_type})
        assert connection.getresponse().status == 200
        connection.close()
        times.append(time.monotonic() - begin)

    with peer(server), dial(server) as channel:
        for _ in range(REQUESTS):
            post(f"{server.otlp_url}/v1/traces", BODY, PROTOBUF)
            post(f"{server.base_url}/api/v1/append_spans", BODY, PROTOBUF)
            post(f"{server.base_url}/v1/chat/completions", CHAT, JSON)
            post(f"{server.base_url}/api/gateway/resume", b"", JSON)
            begin = time.monotonic()
            assert channel.unary_unary(EXPORT)(BODY, timeout=30, metadata=(*TOKEN.items(),)) == b""
            times.append(time.monotonic() - begin)
    assert sorted(times)[-2] < 1, "even on a machine that is busy itself"


@contextmanager
def tls_server(folder: Path) -> Iterator[tuple[ServerThread, SSLContext]]:
    """A server with TLS and the same limit, and the settings of a client that trusts it."""
    authority, files = trustme.CA(), {"certificate": folder / "both.pem", "key": folder / "both.pem"}
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(folder / "both.pem")
    store, trusting = open_store("memory://"), create_default_context()
    authority.configure_trust(trusting)
    with ServerThread(store, port=0, otlp_http_port=0, gateway=GatewayConfig(tls=TlsConfig(**files))) as server:
        yield server, trusting
    store.close()


def test_a_good_sender_does_not_notice_handshakes_that_never_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_thread, "max_connections", lambda: 60)
    with tls_server(tmp_path) as (server, trusting):
        address, times = server.base_url.removeprefix("https://"), list[float]()
        for sent in (b"", b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\n\r\n"):
            with connected(f"http://{address}", 80, sent):
                for _ in range(REQUESTS):
                    begin, connection = time.monotonic(), HTTPSConnection(address, timeout=30, context=trusting)
                    connection.request("GET", "/api/health")
                    assert connection.getresponse().status == 200
                    connection.close()
                    times.append(time.monotonic() - begin)
        assert sorted(times)[-2] < 1, "even on a machine that is busy itself"
        wait_until(lambda: server._connections._open == 0)


# --- Deadlines --------------------------------------------------------------------------------------------------------


def first_line(connection: socket.socket) -> bytes:
    connection.settimeout(20)
    return connection.recv(4096).partition(b"\r\n")[0]


def test_heads_bodies_and_streams_have_deadlines(server: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_S", 0.1)
    monkeypatch.setattr(protocol, "_LINGER_S", 0.1)
    monkeypatch.setattr(receiving, "_GRACE_S", 0.1)
    monkeypatch.setattr(grpc_receiver, "MESSAGE_S", 0.1)
    slow = {"HTTP/1.1 408 Request Timeout"}
    for url, sent in (
        (server.base_url, b"GET / HTTP/1.1\r\nx"),
        (server.otlp_url, b"GET"),
        (server.otlp_url, b""),
        (server.otlp_url, head("/v1/traces", 100) + b"x"),
        (server.base_url, head("/v1/chat/completions", 100, JSON) + b"x"),
        (server.base_url, head("/api/v1/append_spans", 100) + b"x"),
    ):
        with connected(url, 1, sent) as (connection,):
            assert {first_line(connection).decode()} == slow
            while connection.recv(4096):
                pass  # It is closed, too.
    with dial(server) as channel, pytest.raises(grpc.RpcError) as caught:
        silent: Iterator[bytes] = (b"" for _ in iter(threading.Event().wait, True))
        channel.stream_unary(EXPORT)(silent, timeout=30, metadata=(*TOKEN.items(),))
    assert caught.value.code() is grpc.StatusCode.CANCELLED


def test_handshakes_have_a_deadline_and_the_heads_after_them_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_S", 0.1)
    monkeypatch.setattr(protocol, "HEAD_S", 0.1)
    with tls_server(tmp_path) as (server, trusting):
        for sent in (b"", b"\x16\x03\x01\x02\x00\x01"):
            with connected(server.base_url.replace("https", "http"), 1, sent) as (connection,), suppress(OSError):
                connection.settimeout(20)
                assert connection.recv(4096) == b""
        monkeypatch.setattr(tls, "HANDSHAKE_S", 20)
        with connected(server.base_url.replace("https", "http"), 1, b"") as (connection,):
            connection.settimeout(20)
            with trusting.wrap_socket(connection, server_hostname="127.0.0.1") as encrypted:
                assert first_line(encrypted) == b"HTTP/1.1 408 Request Timeout"
        wait_until(lambda: server._connections._open == 0)


def test_a_connection_over_grpc_without_requests_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a few hundred of them would keep all other senders out."""
    monkeypatch.setattr(grpc_receiver, "_IDLE_MS", 200)
    store, preface = open_store("memory://"), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
    with (
        ServerThread(store, port=0, otlp_http_port=0, otlp_grpc_port=0) as server,
        connected(str(server.otlp_grpc_url), 1, preface) as (connection,),
    ):
        connection.settimeout(30)
        while connection.recv(4096):
            pass
    store.close()


def test_a_token_is_checked_at_the_head_and_the_rest_is_not_awaited(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "_LINGER_S", 0.1)
    for url, path in (
        (server.base_url, "/v1/chat/completions"),
        (server.base_url, "/api/v1/append_spans"),
        (server.otlp_url, "/v1/traces"),
    ):
        with connected(url, 1, head(path, 4 * MB, token="wrong")) as (connection,):
            assert first_line(connection) == b"HTTP/1.1 401 Unauthorized"
            while connection.recv(4096):
                pass


def test_a_connection_is_kept_after_a_body_that_ends_later_than_its_response(server: ServerThread) -> None:
    with connected(server.otlp_url, 1, head("/v1/traces", 10, token="wrong")) as (connection,):
        assert first_line(connection) == b"HTTP/1.1 401 Unauthorized"
        connection.sendall(bytes(10) + head("/v1/traces", 0))
        assert first_line(connection) == b"HTTP/1.1 200 OK"


# --- Memory -----------------------------------------------------------------------------------------------------------


def test_the_largest_arriving_body_of_the_peer_that_has_most_gives_way() -> None:
    budget, ended = MemoryBudget(100, 60, "collector"), list[str]()
    arriving = {name: Reservation(budget, name[0]) for name in ("a1", "a2", "b1")}
    with ExitStack() as stack:
        for (name, reservation), size in zip(arriving.items(), (25, 30, 40), strict=True):
            stack.enter_context(reservation.arriving(lambda name=name: ended.append(name)))
            reservation.grow_to(size)
        small, other = Reservation(budget, "a"), Reservation(budget, "c")
        small.grow_to(10)
        assert ended == ["a2"]
        other.grow_to(36)
        assert ended == ["a2", "b1"]
        for reservation in (Reservation(budget, "c"), arriving["a2"]):
            with pytest.raises(ApiError, match="no memory for this body until other requests are done"):
                reservation.grow_to(40)
    whole = Reservation(budget, "d")
    with whole, other, small, arriving["a1"]:
        pass
    whole.grow_to(60)
    with pytest.raises(ApiError, match=r"over 60 bytes \(collector.max_body_bytes\)"):
        whole.grow_to(61)
