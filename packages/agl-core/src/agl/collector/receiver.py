"""The path that every request takes, whatever brought it: admitted, inflated, cut into rows, committed, answered."""

import logging
import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Final, Protocol

from google.rpc.code_pb2 import INVALID_ARGUMENT, UNAUTHENTICATED, UNAVAILABLE
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from agl.config import CollectorConfig
from agl.errors import InputError, OtlpError, StoreError
from agl.server.bearer import BearerTokens
from agl.server.pending import PendingBytes, Room
from agl.store.span_row import Intake, SpanRow

logger = logging.getLogger(__name__)

Read = Callable[[bytes], Intake]

IDENTITY: Final = "identity"
ZLIB_WINDOWS: Final = {"gzip": 31, "deflate": 15}
"""Encodings that are taken besides `identity`, as `zlib` knows them."""
RETRY_AFTER_S: Final = 1
_LONGEST_MESSAGE = 500
"""Characters; a message names what was sent, and gRPC carries it in a header."""
_INFLATED_AT_ONCE = 4 * 2**20
_READ_ALONE = 2**20
"""Bytes; a larger body is parsed while no other large one is: parsed it takes many times its size."""


@dataclass(eq=False)
class Refusal(Exception):
    """Why a request is not kept: an HTTP status, a google.rpc.Code and a sentence.

    A retryable one says that the same request may be taken a second later; any other is final.
    """

    http_status: int
    code: int
    message: str

    @property
    def is_retryable(self) -> bool:
        return self.code == UNAVAILABLE

    def status(self) -> Status:
        """The google.rpc.Status that OTLP answers with, with RetryInfo where it is retryable."""
        status = Status(code=self.code, message=_sayable(self.message))
        if self.is_retryable:
            info = RetryInfo()
            info.retry_delay.FromSeconds(RETRY_AFTER_S)
            status.details.add().Pack(info)
        return status


class Sink(Protocol):
    """What keeps rows: a store, or a queue before one."""

    def append_rows(self, rows: Sequence[SpanRow]) -> int:
        """Keep all of `rows` for good, or none. Raises StoreError: InputError where it never can."""
        ...


class Receiver:
    """Keeps what arrives in `sink`, within the limits of `config`, from senders that `tokens` admit.

    Success is answered only when the sink has them for good. Over its limit of pending bytes it asks the sender to try
    again, and holds nothing.
    """

    def __init__(self, sink: Sink, config: CollectorConfig | None = None, tokens: BearerTokens | None = None) -> None:
        self.config = config or CollectorConfig()
        self._sink = sink
        self._tokens = tokens or BearerTokens()
        self._pending = PendingBytes(self.config.max_pending_bytes)
        self._reading = threading.Lock()

    def admit(self, authorization: bytes | None, size: int = 0) -> Room:
        """Room for a body of `size` bytes (0: not known yet), before it is read. Raises Refusal."""
        if not self._tokens.admit(authorization):
            raise Refusal(401, UNAUTHENTICATED, "a bearer token is needed: send the header `Authorization: Bearer ...`")
        room = Room(self._pending)
        self.hold(room, max(size, 1))
        return room

    def hold(self, room: Room, size: int) -> None:
        """Make room for a body that has grown to `size` bytes. Raises Refusal."""
        if size > self.config.max_body_bytes:
            raise _too_large(self.config.max_body_bytes)
        if not room.hold(size):
            raise _busy()

    def keep(self, body: bytes, encoding: str, read: Read, room: Room) -> ExportTraceServiceResponse:
        """Commit the spans of a body; `encoding` is `identity` or one of ZLIB_WINDOWS. Raises Refusal.

        The answer is empty where every span was taken; spans that can never be kept are a partial success.
        """
        try:
            plain = body if encoding == IDENTITY else self._inflate(body, encoding, room)
            with self._reading if len(plain) > _READ_ALONE else nullcontext():
                intake = read(plain)
            if intake.refused and not intake.rows:
                raise OtlpError(intake.reason)
            self._sink.append_rows(intake.rows)
        except (OtlpError, InputError) as error:
            raise Refusal(400, INVALID_ARGUMENT, str(error)) from error
        except StoreError as error:
            logger.error("spans refused, to be sent again: %s", error)
            raise Refusal(503, UNAVAILABLE, str(error)) from error
        return _answer(intake)

    def _inflate(self, body: bytes, encoding: str, room: Room) -> bytes:
        """The plain body; room is made for each piece before the next is inflated."""
        stream = zlib.decompressobj(ZLIB_WINDOWS[encoding])
        pieces: list[bytes] = []
        size, rest = 0, body
        while not stream.eof:
            piece = _next_piece(stream, rest, encoding)
            pieces.append(piece)
            size, rest = size + len(piece), stream.unconsumed_tail
            if size > self.config.max_body_bytes:
                raise _too_large(self.config.max_body_bytes)
            if not room.hold(len(body) + size):
                raise _busy()
        if stream.unused_data:
            raise OtlpError(f"the body is not one whole {encoding} stream")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _next_piece(stream: "zlib._Decompress", data: bytes, encoding: str) -> bytes:
    try:
        piece = stream.decompress(data, _INFLATED_AT_ONCE)
    except zlib.error as error:
        raise OtlpError(f"the body is not valid {encoding}: {error}") from error
    if not piece and not stream.eof:
        raise OtlpError(f"the body is not one whole {encoding} stream")
    return piece


def _answer(intake: Intake) -> ExportTraceServiceResponse:
    answer = ExportTraceServiceResponse()
    if intake.refused:
        answer.partial_success.rejected_spans = intake.refused
        answer.partial_success.error_message = _sayable(intake.reason)
    return answer


def _sayable(message: str) -> str:
    """`message` as a protobuf string can hold it: it may quote halves of surrogate pairs that a JSON body escaped."""
    return message[:_LONGEST_MESSAGE].encode(errors="replace").decode()


def _too_large(limit: int) -> Refusal:
    return Refusal(413, INVALID_ARGUMENT, f"the body is over {limit} bytes; send smaller batches")


def _busy() -> Refusal:
    return Refusal(503, UNAVAILABLE, "too many spans are on their way to the store; send them again")
