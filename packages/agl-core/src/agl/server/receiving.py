"""Receiving the body of a request: limits on its time, its size and the memory of all requests; content encodings;
clients that disconnect; and work on large bodies.
"""

import asyncio
import io
import re
import threading
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, ParamSpec, Protocol, Self, TypeVar

import zstandard
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agl.server.api_error import ApiError

P = ParamSpec("P")
T = TypeVar("T")

BODY_S: Final = 60.0
"""Limit for receiving a body."""
_GRACE_S: Final = 10.0
LEAST_BYTES_PER_S: Final = 64 * 2**10
"""Least rate of a body, after _GRACE_S, and of a client that reads a response."""
_RETRY_AFTER_S: Final = 1
_JSON_BYTES: Final = 2**26
"""Limit for the objects of a JSON body, unless four times its size is more."""
_SCANNED_BYTES: Final = 2**16
"""JSON that is scanned at once, in less than the 5 ms after which Python lets another thread run."""
IDENTITY: Final = "identity"
_LONG_BYTES: Final = 2**18
"""JSON of this size is read in about 2 ms. For less, a thread costs more than it saves."""
_ENCODED_BYTES: Final = 1024
"""Bytes that are decoded at once, so that the plain ones (32 MB at most) are counted before the next."""


async def read_body(scope: Scope, receive: Receive, reservation: "Reservation") -> bytes:
    """The whole body of an HTTP request, for which memory is reserved as it arrives.

    Raises ApiError for a body that is too large, slower than LEAST_BYTES_PER_S, or not complete after BODY_S seconds,
    for which there is no memory, or that does not have its Content-Length; ClientDisconnect when the client leaves
    before the body is complete.
    """
    declared = content_length(scope)
    reservation.check_size(declared or 0)
    loop, body, more = asyncio.get_running_loop(), io.BytesIO(), True
    begin = loop.time()
    try:
        async with asyncio.timeout_at(begin + _GRACE_S) as limit:
            with reservation.arriving(lambda: loop.call_soon_threadsafe(_end_now, limit)):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    more = message.get("more_body", False)
                    reservation.grow_to(body.tell() + len(message.get("body", b"")))
                    body.write(message.get("body", b""))
                    if not reservation.is_revoked:
                        limit.reschedule(begin + min(_GRACE_S + body.tell() / LEAST_BYTES_PER_S, BODY_S))
    except TimeoutError as error:
        if not reservation.is_revoked:
            message = f"{body.tell()} bytes of the body came in {loop.time() - begin:.0f} s; send faster"
            raise ApiError(408, "slow_body", message) from error
    if reservation.is_revoked:
        raise _busy()
    if declared is not None and body.tell() != declared:
        raise ApiError(400, "incomplete_body", f"the body has {body.tell()} bytes, its Content-Length is {declared}")
    return body.getvalue()


def _end_now(limit: asyncio.Timeout) -> None:
    with suppress(RuntimeError):  # The body is complete.
        limit.reschedule(0)


def peer_of(scope: Scope) -> str:
    """Address of the client; empty if it is unknown."""
    client = scope.get("client")
    return client[0] if client else ""


def content_length(scope: Scope) -> int | None:
    """The declared length of the body; None if the request declares none."""
    length = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    return int(length) if re.fullmatch(rb"\d{1,18}", length) else None


def check_json(body: bytes, reservation: "Reservation") -> None:
    """Reserve memory for the objects of a JSON body if they take much more than the body. Raises ApiError if too much.

    The estimate takes every comma and bracket for an element: at first all of them, then those outside of strings.
    """
    enough = 4 * len(body)
    if _objects_bytes(body) <= enough:
        return
    size, limit = 0, max(enough, _JSON_BYTES)
    for piece in _outside_strings(body):
        size += _objects_bytes(piece)
        if size > limit:
            raise ApiError(413, "too_many_values", f"{len(body)} bytes of JSON have too many values; send fewer")
    if size > enough:
        reservation.grow_to(len(body) + size, len(body))


def _outside_strings(json: bytes) -> Iterator[bytes]:
    """The text of `json` outside of its strings, by pieces."""
    json = json.replace(rb"\\", b"").replace(rb"\"", b"")
    in_string = 0
    for start in range(0, len(json), _SCANNED_BYTES):
        texts = json[start : start + _SCANNED_BYTES].split(b'"')
        yield b"".join(texts[in_string::2])
        in_string ^= (len(texts) - 1) % 2


def _objects_bytes(json: bytes) -> int:
    """Approximate memory of the lists, objects and numbers of a JSON text in Python."""
    return 36 * json.count(b",") + 64 * json.count(b"[") + 232 * json.count(b"{")


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
    """Limits the bytes that the bodies of all requests take, from their arrival until the requests are done.

    If there is no room, a body that still arrives gives way to a smaller one: the largest, of the peer that has most.
    """

    def __init__(self, limit: int, max_body_bytes: int, section: str) -> None:
        self.max_body_bytes = max_body_bytes
        self.section = section
        self._limit = limit
        self._reserved = 0
        self._arriving: dict[Reservation, Callable[[], object]] = {}
        """Each with what ends it."""
        self._lock = threading.Lock()

    def resize(self, reservation: "Reservation", size: int) -> bool:
        """Change the size of `reservation`; False, without any effect, if there is no room."""
        with self._lock:
            while size > reservation.size and self._reserved - reservation.size + size > self._limit:
                if not self._revoke_larger(reservation, size):
                    return False
            self._reserved += size - reservation.size
            reservation.size = size
            return True

    def set_arriving(self, reservation: "Reservation", revoke: Callable[[], object] | None) -> None:
        with self._lock:
            if revoke is None:
                self._arriving.pop(reservation, None)
            else:
                self._arriving[reservation] = revoke

    def _revoke_larger(self, other: "Reservation", size: int) -> bool:
        """Revoke the largest reservation that arrives, if it is larger than `other` with `size` bytes."""
        sums = Counter({other.peer: size - other.size})
        for one in self._arriving:
            sums[one.peer] += one.size
        largest = max(self._arriving, key=lambda one: (sums[one.peer], one.size), default=other)
        if largest is other or (sums[largest.peer], largest.size) <= (sums[other.peer], size):
            return False
        self._arriving.pop(largest)()
        self._reserved -= largest.size
        largest.size, largest.is_revoked = 0, True
        return True


class Reservation:
    """The bytes of one request of `peer`; the context manager releases them on exit."""

    def __init__(self, budget: MemoryBudget, peer: str) -> None:
        self._budget = budget
        self.peer = peer
        self.size = 0
        self.is_revoked = False

    def check_size(self, size: int) -> None:
        """Raises ApiError if a body of `size` bytes is too large."""
        if size > (limit := self._budget.max_body_bytes):
            setting = f"{self._budget.section}.max_body_bytes"
            raise ApiError(413, "too_large", f"the body is over {limit} bytes ({setting}); send less at once")

    def grow_to(self, size: int, body_size: int | None = None) -> None:
        """Reserve at least `size` bytes in total, for a body of `body_size` (default: `size`). Raises ApiError."""
        self.check_size(size if body_size is None else body_size)
        if self.is_revoked or (size > self.size and not self._budget.resize(self, size)):
            raise _busy()

    @contextmanager
    def arriving(self, revoke: Callable[[], object]) -> Iterator[None]:
        """While the body arrives; `revoke` is called, in any thread, if it has to give way to another one."""
        self._budget.set_arriving(self, revoke)
        try:
            yield
        finally:
            self._budget.set_arriving(self, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._budget.resize(self, 0)


class BodyMiddleware:
    """Passes a request on to `app` when its body is complete, within the limits of `budget`."""

    def __init__(self, app: ASGIApp, budget: MemoryBudget) -> None:
        self._app = app
        self._budget = budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        with Reservation(self._budget, peer_of(scope)) as reservation:
            try:
                whole: list[Message] = [{"type": "http.request", "body": await read_body(scope, receive, reservation)}]
            except ClientDisconnect:
                return
            except ApiError as error:
                return await error.response()(scope, receive, send)

            async def receive_whole() -> Message:
                return whole.pop() if whole else await receive()

            await self._app(scope, receive_whole, send)


def _busy() -> ApiError:
    message = "the server has no memory for this body until other requests are done; send it again"
    return ApiError(503, "unavailable", message, retry_after_s=_RETRY_AFTER_S)


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
