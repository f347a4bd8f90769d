"""The HTTP protocol of a connection, and the connections of all HTTP ports together."""

import asyncio
import resource
import time
from collections import Counter
from typing import ClassVar, Final, Protocol

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from agl.server.receiving import LEAST_BYTES_PER_S

MAX_HEAD_BYTES: Final = 64 * 2**10
HEAD_S: Final = 10.0
"""Limit for receiving a head."""
SEND_S: Final = 60.0
_LINGER_S: Final = 5.0
_MOST_CONNECTIONS: Final = 8192
_HEADS_BYTES: Final = 32 * 2**20
"""Limit for the heads that have not arrived, together."""
_YOUNG_S: Final = 0.1
"""Age under which a connection is the last that has to go. Nearly all heads arrive with their connection."""
_TOO_LARGE: Final = ("431 Request Header Fields Too Large", b"the head is over %d bytes" % MAX_HEAD_BYTES)
_TOO_SLOW: Final = ("408 Request Timeout", b"the head was not complete after %d s" % HEAD_S)
_OF_UPGRADES: Final = (b"upgrade", b"http2-settings", b"connection")


def max_connections(share: float = 3 / 4) -> int:
    """This share of the files that the process may open; the rest is for gRPC, engines and the store."""
    soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(int(soft_limit * share), _MOST_CONNECTIONS) if soft_limit > 0 else _MOST_CONNECTIONS


class Waiting(Protocol):
    """A connection that waits for bytes of its peer."""

    @property
    def peer(self) -> str: ...

    def abort(self) -> None: ...


class Connections:
    """The connections that wait for bytes of their peer, and the number of all.

    Above `limit`, or if the heads that have not arrived take too much memory, the peer that has most of these
    connections loses those that have waited longest.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: dict[Waiting, float] = {}
        """Since when, in this order."""
        self._open = 0
        self._head_bytes = 0

    def open(self) -> None:
        self._open += 1
        if self._open > self._limit:
            self._close_some()

    def close(self) -> None:
        self._open -= 1

    def wait(self, connection: Waiting) -> None:
        self._waiting.pop(connection, None)
        self._waiting[connection] = time.monotonic()

    def proceed(self, connection: Waiting) -> None:
        self._waiting.pop(connection, None)

    def count_head(self, size: int) -> None:
        """Count the bytes of a head that is not complete; negative once it is."""
        self._head_bytes += size
        if size > 0 and self._head_bytes > _HEADS_BYTES:
            self._close_some()

    def _close_some(self) -> None:
        """Close a 16th of them: to find them takes time, for which nobody should pay with each further connection."""
        held, young = Counter(one.peer for one in self._waiting), time.monotonic() - _YOUNG_S
        key = {one: (since > young, -held[one.peer], since) for one, since in self._waiting.items()}
        for one in sorted(key, key=key.__getitem__)[: 1 + self._limit // 16]:
            one.abort()


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with what it lacks.

    - It rejects a request head (request line and headers) of more than MAX_HEAD_BYTES before all of it is in memory,
      and one that is not complete after HEAD_S seconds.
    - It closes a connection on which a body goes on _LINGER_S seconds after the response.
    - It closes other connections, as `peers` chooses, when there are too many.
    - It declines an upgrade (`h2c`, `websocket`) by answering the request as HTTP/1.1, with its body (RFC 9110, 7.8).
      httptools takes the bytes after such a head for another protocol.
    - It closes the connection of a client that reads a long response at less than LEAST_BYTES_PER_S, over `send_s`
      seconds.
    """

    send_s: ClassVar[float] = SEND_S
    peers: ClassVar[Connections]
    _head_bytes = 0
    _in_head = False
    _has_body = False
    """Whether more of the request's body is to come."""
    _unread: asyncio.TimerHandle | None = None
    _slow: asyncio.TimerHandle | None = None

    @property
    def peer(self) -> str:
        return self.client[0] if self.client else ""

    def abort(self) -> None:
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] - as uvicorn does
        super().connection_made(transport)
        self._wait_for_head()
        self.peers.open()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self.cycle is None or self.cycle.response_complete:
            self._wait_for_head()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            return self.send_400_response("Invalid HTTP request received.")
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            self.peers.count_head(len(data))
            if self._head_bytes > MAX_HEAD_BYTES:
                self._reject(*_TOO_LARGE)

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
        self._wait_for_head()
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._end_head()
        self._head_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError  # The parser stops, and `send_400_response` is called.
        if not self.parser.should_upgrade():
            self._has_body = True
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._has_body = False
        super().on_message_complete()
        if not self.cycle.response_complete:
            self.peers.proceed(self)
        else:  # The response came before the end of the body; from here on it is as after any response.
            self.peers.wait(self)
            self._stop_timer()
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.cycle.response_complete:
            return  # Of a request that came before this response.
        self.peers.wait(self)
        if self._has_body and self._slow is None:
            self._slow = self.loop.call_later(_LINGER_S, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        if self._head_bytes > MAX_HEAD_BYTES:
            self._reject(*_TOO_LARGE)
        else:
            super().send_400_response(msg)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def _expect_reading(self) -> None:
        self._unread = self.loop.call_later(self.send_s, self._check_reading, self.transport.get_write_buffer_size())

    def _check_reading(self, unread_bytes: int) -> None:
        if unread_bytes - self.transport.get_write_buffer_size() < self.send_s * LEAST_BYTES_PER_S:
            self.transport.abort()
        else:
            self._expect_reading()

    def resume_writing(self) -> None:
        self._read()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._read()
        self._end_head()
        self.peers.proceed(self)
        self.peers.close()
        super().connection_lost(exc)

    def _read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()

    def _wait_for_head(self) -> None:
        if self._slow is None:
            self._slow = self.loop.call_later(HEAD_S, self._reject, *_TOO_SLOW)
            self.peers.wait(self)

    def _end_head(self) -> None:
        """The head is complete, or the connection lost."""
        if self._in_head:
            self.peers.count_head(-self._head_bytes)
            self._in_head = False
        self._stop_timer()

    def _stop_timer(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None

    def _reject(self, status: str, message: bytes) -> None:
        head = f"HTTP/1.1 {status}\r\ncontent-type: text/plain\r\nconnection: close\r\ncontent-length: {len(message)}"
        self.transport.write(b"%b\r\n\r\n%b" % (head.encode(), message))
        self.transport.close()
