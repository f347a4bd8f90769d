"""The protocol of an API that clients speak, the two APIs that engines speak too, and server-sent events."""

import json
import re
from codecs import BOM_UTF8
from dataclasses import replace
from typing import ClassVar, Final, Protocol

from starlette.responses import Response

from agl import semconv
from agl.server.api_error import ApiError
from agl.tokens.capture import Capture, Json, RequestedFields, is_empty_chunk, strip

DONE: Final = b"[DONE]"
"""Data of the server-sent event that ends a stream."""
_EVENT_END: Final = re.compile(rb"\r?\n\r?\n")
_LONGEST_END: Final = 4


class EventSplitter:
    """Splits the pieces of a stream into server-sent events. The time is linear in the bytes, however they arrive."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def split(self, piece: bytes) -> list[bytes]:
        """The events that are complete with `piece`, without the blank lines that end them."""
        if not self._rest:  # A piece is nearly always some whole events.
            *events, rest = _EVENT_END.split(piece)
            self._rest += rest
            return events
        searched = max(0, len(self._rest) - _LONGEST_END + 1)
        self._rest += piece
        ends = [match.span() for match in _EVENT_END.finditer(self._rest, searched)]
        starts = [0, *(end for _, end in ends)]
        events = [bytes(self._rest[start:end]) for start, (end, _) in zip(starts, ends, strict=False)]
        del self._rest[: starts[-1]]
        return events

    @property
    def rest(self) -> bytes:
        """The start of an event that is not complete."""
        return bytes(self._rest)


def event_data(event: bytes) -> bytes:
    """The `data` of a server-sent event; empty for a comment. The first event may start with a byte order mark."""
    lines = event.removeprefix(BOM_UTF8).splitlines()
    return b"\n".join(line[5:].strip() for line in lines if line.startswith(b"data:"))


def to_event(data: Json, name: str = "") -> bytes:
    """A server-sent event, with the blank line that ends it."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


class Dialect(Protocol):
    """One call in the client's API. The caller adds each part of the response to `capture`, then renders it."""

    operation: ClassVar[str]
    path: ClassVar[str]
    """Path of the engine's API, below its base URL."""
    is_native: ClassVar[bool]
    """Whether engines speak this API; else the request is translated."""

    request: Json
    """The request in the engine's API."""
    streams: bool
    """Whether the client requested a stream."""
    requested: RequestedFields
    """The captured fields that `request` asks for by itself."""
    capture: Capture
    """The response as far as it has arrived."""

    def __init__(self, body: Json, model: str | None) -> None:
        """Read the client's request; `model` is the engines' name for its model.

        Raises ApiError for a request that engines cannot serve.
        """

    def render_whole(self, raw: bytes, response: Json) -> bytes:
        """The body for the client. `raw` is the engine's body, `response` the same as JSON, which may be changed."""
        ...

    def render_chunk(self, event: bytes, chunk: Json) -> bytes:
        """Events for the client, or none. `event` is the engine's, `chunk` its data, which may be changed."""
        ...

    def render_end(self, done: bytes) -> bytes:
        """The end of the stream. `done` is the engine's last event; empty if the engine sent none."""
        ...

    def render_error(self, error: ApiError) -> bytes:
        """The event that ends a stream that fails."""
        ...

    def engine_error(self, raw: bytes, status: int) -> bytes:
        """The body for an error response of the engine, whose body is `raw`."""
        ...

    @classmethod
    def error_response(cls, error: ApiError) -> Response:
        """The response to a call that fails before any part of a response was sent."""
        ...


class _Native(Dialect):
    """Passes the engine's response on, without the fields that only the gateway requested."""

    is_native = True

    def __init__(self, body: Json, model: str | None) -> None:
        self.request = body
        self.streams = bool(body.get("stream"))
        self.requested = RequestedFields.read(body, self.operation)
        self.capture = Capture()
        if model != self.requested.model:
            self.request = body | {"model": model}
            self.requested = replace(self.requested, sent_model=model)

    def render_whole(self, raw: bytes, response: Json) -> bytes:
        return json.dumps(response, separators=(",", ":")).encode() if strip(response, self.requested) else raw

    def render_chunk(self, event: bytes, chunk: Json) -> bytes:
        if not strip(chunk, self.requested):
            return event + b"\n\n"
        return b"" if is_empty_chunk(chunk) else to_event(chunk)

    def render_end(self, done: bytes) -> bytes:
        return done and done + b"\n\n"

    def render_error(self, error: ApiError) -> bytes:
        return to_event(error.body())

    def engine_error(self, raw: bytes, status: int) -> bytes:
        return raw

    @classmethod
    def error_response(cls, error: ApiError) -> Response:
        return error.response()


class ChatCompletion(_Native):
    operation = semconv.OPERATION_CHAT
    path = "/chat/completions"


class TextCompletion(_Native):
    operation = semconv.OPERATION_TEXT_COMPLETION
    path = "/completions"
