"""Server-sent events, as engines stream their answers."""

import json
import re

from agl.tokens.capture import Json

DONE = b"[DONE]"
"""Data of the event that ends a stream."""
NOT_RECORDED = b": the call could not be recorded\n\n"
"""A comment: clients skip it, people who look at the wire do not."""
_EVENT_END = re.compile(rb"\r?\n\r?\n")


def split_events(received: bytes) -> tuple[list[bytes], bytes]:
    """The complete server-sent events in `received`, without the blank lines that end them, and the rest."""
    *events, rest = _EVENT_END.split(received)
    return events, rest


def event_data(event: bytes) -> bytes:
    """The `data` of a server-sent event; empty for a comment."""
    return b"\n".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))


def to_event(data: Json, name: str = "") -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"
