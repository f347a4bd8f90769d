"""Receiving a request: limits on its head, its body and the memory of all requests; content encodings; upgrades;
clients that disconnect or do not read; and work on large bodies.
"""

import asyncio
import threading
import zlib
from collections.abc import Awaitable, Callable
from typing import ClassVar, Final, ParamSpec, Protocol, Self, TypeVar

import httptools
import zstandard
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from agl.server.api_error import ApiError

P = ParamSpec("P")
T = TypeVar("T")

MAX_HEAD_BYTES: Final = 64 * 2**10
SEND_S: Final = 60.0
BODY_S: Final = 60.0
"""Limit for receiving a body."""
IDENTITY: Final = "identity"
_RESPONSE: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b"
)
_MESSAGE: Final = b"the head of the request is over %d bytes" % MAX_HEAD_BYTES
_OF_UPGRADES: Final = (b"upgrade", b"http2-settings", b"connection")
_LONG_BYTES: Final = 2**18
"""JSON of this size is read in about 2 ms. For less, a thread costs more than it saves."""
_ENCODED_BYTES: Final = 1024
"""Bytes that are decoded at once, so that the plain ones (32 MB at most) are counted before the next."""


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with what it lacks.

    - It rejects a request head (request line and headers) of more than MAX_HEAD_BYTES before all of it is in memory.
    - It declines an upgrade (`h2c`, `websocket`) by answering the request as HTTP/1.1, with its body (RFC 9110, 7.8).
      httptools takes the bytes after such a head for another protocol.
    - It closes the connection of a client that reads nothing for `send_s` seconds.
    """

    send_s: ClassVar[float] = SEND_S
    _head_bytes = 0
    _in_head = False
    _unread: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            return self.send_400_response("Invalid HTTP request received.")
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._reject()

    def _parse(self, data: bytes) -> None:
        while data:
            try:
                return self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = self._without_upgrade() + data[upgrade.args[0] :]
            self.parser = httptools.HttpRequestParser(self)

    def _without_upgrade(self) -> bytes:
        """The head of the request that the parser has read, without the upgrade that it asks for."""
        if (method := self.parser.get_method()) == b"CONNECT":
            raise httptools.HttpParserError("CONNECT")
        kept = [b"%b: %b\r\n" % header for header in self.headers if header[0] not in _OF_UPGRADES]
        closes = b"" if self.parser.should_keep_alive() else b"connection: close\r\n"
        return b"%b %b HTTP/1.1\r\n%b%b\r\n" % (method, self.url, b"".join(kept), closes)

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError  # The parser stops, and `send_400_response` is called.
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if self._head_bytes > MAX_HEAD_BYTES:
            self._reject()
        else:
            super().send_400_response(msg)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.send_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._read()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._read()
        super().connection_lost(exc)

    def _read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()

    def _reject(self) -> None:
        self.transport.write(_RESPONSE % (len(_MESSAGE), _MESSAGE))
        self.transport.close()


async def read_body(scope: Scope, receive: Receive, check_size: Callable[[int], None]) -> bytes:
    """The whole body of an HTTP request.

    `check_size` gets the number of bytes received so far after each piece; what it raises ends the reading. Raises
    ApiError for a body that is not complete after BODY_S seconds, or does not have its Content-Length; ClientDisconnect
    when the client leaves before the body is complete.
    """
    pieces: list[bytes] = []
    size, more, declared = 0, True, content_length(scope)
    try:
        async with asyncio.timeout(BODY_S):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                piece, more = message.get("body", b""), message.get("more_body", False)
                size += len(piece)
                check_size(size)
                pieces.append(piece)
    except TimeoutError as error:
        raise ApiError(408, "slow_body", f"the body was not complete after {BODY_S:g} s") from error
    if declared is not None and size != declared:
        raise ApiError(400, "incomplete_body", f"the body has {size} bytes, its Content-Length is {declared}")
    return b"".join(pieces)


def content_length(scope: Scope) -> int | None:
    """The declared length of the body; None if the request declares none."""
    length = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    return int(length) if length.isdigit() else None


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


_DECODERS: Final[dict[str, Callable[[], _Decoder]]] = {
    "gzip": lambda: zlib.decompressobj(31),
    "deflate": zlib.decompressobj,
    "zstd": lambda: zstandard.ZstdDecompressor().decompressobj(),
}
ENCODINGS: Final = (IDENTITY, *_DECODERS)
"""The content encodings that `decode_body` knows."""


def decode_body(body: bytes, encoding: str, check_size: Callable[[int], None]) -> bytes:
    """The plain form of a body with one of ENCODINGS: of all its members or frames, if it has several.

    `check_size` gets the number of plain bytes so far; what it raises ends the decoding. Raises ValueError for a body
    that is not in this encoding, or not complete.
    """
    if encoding == IDENTITY:
        return body
    pieces: list[bytes] = []
    size, decoder, has_member = 0, _DECODERS[encoding](), False
    for start in range(0, len(body), _ENCODED_BYTES):
        rest = body[start : start + _ENCODED_BYTES]
        while rest:
            if decoder.eof:
                decoder, has_member = _DECODERS[encoding](), True
            try:
                pieces.append(decoder.decompress(rest))
            except (zlib.error, zstandard.ZstdError) as error:
                fault = f"one whole {encoding} stream" if has_member else f"valid {encoding}: {error}"
                raise ValueError(f"the body is not {fault}") from error
            size += len(pieces[-1])
            check_size(size)
            rest = decoder.unused_data
    if not decoder.eof:
        raise ValueError(f"the body is not one whole {encoding} stream")
    return b"".join(pieces)


class MemoryBudget:
    """Limits the bytes that all requests of a server hold in memory while their spans are not committed yet."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._reserved = 0
        self._lock = threading.Lock()

    def add(self, size: int) -> bool:
        """Reserve `size` more bytes; a negative size releases. False, without any effect, if the limit is exceeded."""
        with self._lock:
            if size > 0 and self._reserved + size > self._limit:
                return False
            self._reserved += size
            return True


class Reservation:
    """The bytes of one request; the context manager releases them on exit."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._size = 0

    def grow_to(self, size: int) -> bool:
        """Reserve at least `size` bytes in total; False if the budget has no room for them now."""
        if size <= self._size:
            return True
        if not self._budget.add(size - self._size):
            return False
        self._size = size
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._budget.add(-self._size)
        self._size = 0


async def run_while_connected(receive: Receive, work: Awaitable[None]) -> None:
    """Await `work`, in this task, and cancel it when the client disconnects; the body has been read."""
    task, disconnected = asyncio.current_task(), False
    assert task is not None

    def cancel(_: object) -> None:
        nonlocal disconnected
        disconnected = True
        task.cancel()

    watch = asyncio.create_task(_disconnect(receive))
    watch.add_done_callback(cancel)
    try:
        await work
    except asyncio.CancelledError:
        if not disconnected:
            raise
        task.uncancel()
    finally:
        watch.remove_done_callback(cancel)
        watch.cancel()


async def long_work(size: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`work(...)` on data of `size` bytes: in a thread if these are many, so that other requests go on.

    The data belongs to the caller alone: if it is cancelled, it goes on only after the end of the work.
    """
    if size < _LONG_BYTES:
        return work(*args, **kwargs)
    task = asyncio.create_task(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
