"""Limits the size of an HTTP/1.1 request head (request line and headers); uvicorn with httptools has no limit."""

from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES: Final = 64 * 2**10
_RESPONSE: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b"
)
_MESSAGE: Final = b"the head of the request is over %d bytes" % MAX_HEAD_BYTES


class HttpProtocol(HttpToolsProtocol):
    """Rejects a head of more than MAX_HEAD_BYTES before all of it is in memory."""

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
