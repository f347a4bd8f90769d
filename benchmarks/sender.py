"""Sends request bodies to a collector over keep-alive HTTP/1.1 connections, one thread each, all bytes prepared."""

import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlsplit

from benchmarks.corpus import Body

_AGAIN = (429, 503)


class Sender:
    """One load. `send` returns once all bodies are acknowledged; `latencies_s` then has the latency of each in s."""

    def __init__(
        self, url: str, bodies: Sequence[Body], connections: int, headers: Mapping[str, str] | None = None
    ) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname, parts.port)
        self._connections = connections
        head = f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/x-protobuf\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        self._requests = [f"{head}content-length: {len(body)}\r\n\r\n".encode() + body for _, body in bodies]
        self.latencies_s: list[float] = []
        self.refused = 0

    def send(self) -> None:
        """Send all bodies. Raises ValueError for a status that means neither success nor retry."""
        waiting, lock = iter(self._requests), threading.Lock()
        failed: list[Exception] = []
        threads = [threading.Thread(target=self._run, args=(waiting, lock, failed)) for _ in range(self._connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]

    def _run(self, waiting: Iterator[bytes], lock: threading.Lock, failed: list[Exception]) -> None:
        try:
            with socket.create_connection(self._address, timeout=120) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while True:
                    with lock:
                        request = next(waiting, None)
                    if request is None:
                        return
                    self._deliver(connection, request)
        except (OSError, ValueError) as error:
            failed.append(error)

    def _deliver(self, connection: socket.socket, request: bytes) -> None:
        while True:
            begin = time.perf_counter()
            connection.sendall(request)
            status, answer = _read_answer(connection)
            if status == 200:
                self.latencies_s.append(time.perf_counter() - begin)
                return
            if status not in _AGAIN:
                raise ValueError(f"the receiver answered {status}: {answer[:500]!r}")
            self.refused += 1
            time.sleep(0.1)


def _read_answer(connection: socket.socket) -> tuple[int, bytes]:
    received = b""
    while b"\r\n\r\n" not in received:
        received += _more(connection)
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0] or 0)
    while len(body) < length:
        body += _more(connection)
    return int(head.split(b" ", 2)[1]), body


def _more(connection: socket.socket) -> bytes:
    piece = connection.recv(65_536)
    if not piece:
        raise ConnectionError("the receiver closed the connection before its response was complete")
    return piece
