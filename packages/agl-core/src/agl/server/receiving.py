"""Receiving a request: limits on its head, its body and the memory of all requests, and the client's disconnect."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Final, Self

from starlette.requests import ClientDisconnect
from starlette.types import Receive
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES: Final = 64 * 2**10
_RESPONSE: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b"
)
_MESSAGE: Final = b"the head of the request is over %d bytes" % MAX_HEAD_BYTES


class HttpProtocol(HttpToolsProtocol):
    """Rejects a request head (request line and headers) of more than MAX_HEAD_BYTES before all of it is in memory.

    uvicorn with httptools has no limit of its own.
    """

    _head_bytes = 0
    _in_head = False

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._reject()

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError  # The parser stops, and `send_400_response` is called.
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        if self._head_bytes > MAX_HEAD_BYTES:
            self._reject()
        else:
            super().send_400_response(msg)

    def _reject(self) -> None:
        self.transport.write(_RESPONSE % (len(_MESSAGE), _MESSAGE))
        self.transport.close()


async def read_body(receive: Receive, check_size: Callable[[int], None]) -> bytes:
    """The whole body of an HTTP request.

    `check_size` gets the number of bytes received so far after each piece; what it raises ends the reading. Raises
    ClientDisconnect when the client leaves before the body is complete.
    """
    pieces: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece, more = message.get("body", b""), message.get("more_body", False)
        size += len(piece)
        check_size(size)
        pieces.append(piece)
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


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
