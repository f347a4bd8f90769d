"""Bodies against their framing, declined upgrades, content encodings, and clients that read nothing."""

import contextlib
import gzip
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator

import pytest
import zstandard
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from agl.server.api_error import ApiError
from agl.server.app_thread import AppThread
from agl.server.protocol import HttpProtocol
from agl.server.receiving import ENCODINGS, MemoryBudget, Reservation, decode_body, read_body

BODY = b'{"model": "base"}'
H2C = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
UPGRADES = {
    "h2c": H2C,
    "websocket": "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
}
BIG = bytes(64 * 2**20)
ended = threading.Event()


def reservation() -> Reservation:
    return Reservation(MemoryBudget(2**20, 2**20, "test"), "peer")


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the body; at /big with more than a connection holds, and no end."""
    body = await read_body(scope, receive, reservation())
    if scope["path"] == "/big":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": BIG, "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        return ended.set()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = AppThread()
    url = server.add(echo, send_s=0.2)
    with server:
        yield int(url.rpartition(":")[2])


def answered(port: int, *pieces: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.02 if len(pieces) > 1 else 0)
        received = b""
        with contextlib.suppress(TimeoutError):
            connection.settimeout(2)
            while not received.endswith(BODY) and (more := connection.recv(4096)):
                received += more
        return received


def head(upgrade: str, framing: str) -> bytes:
    return f"POST / HTTP/1.1\r\nHost: localhost\r\n{upgrade}{framing}\r\n\r\n".encode()


@pytest.mark.parametrize("upgrade", UPGRADES.values(), ids=UPGRADES)
@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("chunked", [False, True])
def test_an_upgrade_is_declined_and_the_request_answered_with_its_body(
    port: int, upgrade: str, size: int, chunked: bool
) -> None:
    length = f"Content-Length: {len(BODY)}"
    sent = head(upgrade, "Transfer-Encoding: chunked" if chunked else length)
    sent += b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY) if chunked else BODY
    pieces = [sent] if size == 1000 else [sent[: -size - 3], sent[-size - 3 : -3], sent[-3:]]
    answer = answered(port, *pieces)
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"\r\n\r\n" + BODY)


def test_requests_after_a_declined_upgrade_are_answered(port: int) -> None:
    request = head(H2C, f"Content-Length: {len(BODY)}") + BODY
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for _ in range(3):
            connection.sendall(request)
            received = b""
            while not received.endswith(BODY):
                received += connection.recv(4096)
            assert received.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("request_line", [b"CONNECT x:1 HTTP/1.1", b"junk"])
def test_what_is_no_request_is_a_400(port: int, request_line: bytes) -> None:
    assert answered(port, request_line + b"\r\nhost: localhost\r\n\r\n").startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("sent", [b"", BODY[:-1], BODY + b"x"])
async def test_a_body_that_is_not_as_long_as_declared_is_an_error(sent: bytes) -> None:
    async def receive() -> Message:
        return {"type": "http.request", "body": sent, "more_body": False}

    scope = {"headers": [(b"content-length", b"%d" % len(BODY))]}
    with pytest.raises(ApiError, match=f"the body has {len(sent)} bytes, its Content-Length is {len(BODY)}") as caught:
        await read_body(scope, receive, reservation())
    assert caught.value.http_status == 400


async def test_a_client_that_leaves_within_its_body_is_not_answered() -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnect):
        await read_body({"headers": []}, receive, reservation())


def test_a_client_that_reads_nothing_is_disconnected_after_send_s(port: int) -> None:
    ended.clear()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"POST /big HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n")
        assert ended.wait(10)


def test_a_client_that_reads_on_is_not_disconnected(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check of the client comes after the client has read more, however slow the machine is."""
    check, read, checked = HttpProtocol._check_reading, threading.Event(), threading.Event()

    def check_later(protocol: HttpProtocol, unread_bytes: int) -> None:
        if read.is_set():
            read.clear()
            check(protocol, unread_bytes)
            checked.set()
        else:
            protocol._unread = protocol.loop.call_later(0.01, check_later, protocol, unread_bytes)

    monkeypatch.setattr(HttpProtocol, "_check_reading", check_later)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)  # So that the server holds the rest.
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"POST /big HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n")
        for _ in range(2):
            assert len(connection.recv(len(BIG) // 4, socket.MSG_WAITALL)) == len(BIG) // 4
            read.set()
            assert checked.wait(30)
            checked.clear()
        assert len(connection.recv(2**16, socket.MSG_WAITALL)) == 2**16


# --- Content encodings -----------------------------------------------------------------------------------------------

ENCODE: dict[str, Callable[[bytes], bytes]] = {
    "identity": bytes,
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "zstd": zstandard.compress,
}


def unlimited(_: int) -> None:
    pass


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_bodies_are_decoded_with_all_their_members(encoding: str, size: int) -> None:
    plain = bytes(number * number % 251 for number in range(size))
    encode = ENCODE[encoding]
    assert decode_body(encode(plain), encoding, unlimited) == plain
    several = b"".join(encode(plain[start : start + 7000]) for start in range(0, size, 7000))
    assert decode_body(several or encode(b""), encoding, unlimited) == plain


@pytest.mark.parametrize("encoding", ENCODINGS[1:])
def test_a_body_that_is_cut_or_continued_with_something_else_is_an_error(encoding: str) -> None:
    whole = ENCODE[encoding](BODY)
    for body in (b"", b"junk", whole[:-1], whole[:3], whole + b"junk", whole + whole[:-1]):
        with pytest.raises(ValueError, match=f"not (valid|one whole) {encoding}"):
            decode_body(body, encoding, unlimited)


@pytest.mark.parametrize("encoding", ENCODINGS[1:])
def test_decoding_stops_at_the_limit(encoding: str) -> None:
    sizes: list[int] = []

    def check(size: int) -> None:
        sizes.append(size)
        if size > 10_000:
            raise ApiError(413, "too_large", "over 10000 bytes")

    with pytest.raises(ApiError):
        decode_body(ENCODE[encoding](bytes(2**28)), encoding, check)
    assert sizes[-1] < 40 * 2**20
