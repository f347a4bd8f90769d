"""Protobuf requests by their bytes alone: one field written, a large request cut into small ones."""

from collections.abc import Iterator
from itertools import groupby
from typing import Final

PIECE_BYTES: Final = 2**20
"""A request is parsed in pieces of about this size: parsed it takes ten times its own."""

_LENGTH_DELIMITED: Final = 2
_LONGEST_VARINT: Final = 5

# Of ExportTraceServiceRequest, ResourceSpans and ScopeSpans: what is said of the spans, then the spans.
_REQUEST_SPANS: Final = 1
_HEADING, _SPANS, _SCHEMA_URL = 1, 2, 3

Heading = tuple[bytes, bytes]
"""A resource and a scope."""


class _UnusualError(Exception):
    """Something that only a parser of protobuf can judge."""


def field(number: int, payload: bytes | memoryview) -> bytes:
    """A length-delimited field of a message: tag, length as varint, payload."""
    length, head = len(payload), (number << 3 | _LENGTH_DELIMITED,)
    if length < 0x4000:  # nearly all: one byte, or two
        head += (length,) if length < 0x80 else (length & 0x7F | 0x80, length >> 7)
        return bytes(head) + payload
    varint = bytearray(head)
    while length > 0x7F:
        varint.append(length & 0x7F | 0x80)
        length >>= 7
    varint.append(length)
    return bytes(varint) + payload


def cut(body: bytes) -> Iterator[bytes]:
    """Requests that together have the spans of a trace request, in order, each of one span or about PIECE_BYTES.

    A body that is small, or not made in the usual way, comes as it is: the parser says whether it is broken.
    """
    if len(body) <= PIECE_BYTES:
        return iter((body,))
    try:
        spans = list(_spans(memoryview(body)))
    except _UnusualError:
        return iter((body,))
    return _pieces(spans)


def _pieces(spans: list[tuple[Heading, memoryview]]) -> Iterator[bytes]:
    for (resource, scope), members in groupby(spans, key=lambda pair: pair[0]):
        written: list[bytes] = []
        size = 0
        for _, span in members:
            if written and size + len(span) > PIECE_BYTES:
                yield _request(resource, scope, written)
                written, size = [], 0
            written.append(field(_SPANS, span))
            size += len(span)
        yield _request(resource, scope, written)


def _request(resource: bytes, scope: bytes, spans: list[bytes]) -> bytes:
    in_scope = field(_SPANS, field(_HEADING, scope) + b"".join(spans))
    return field(_REQUEST_SPANS, field(_HEADING, resource) + in_scope)


def _spans(body: memoryview) -> Iterator[tuple[Heading, memoryview]]:
    for number, resource_spans in _fields(body):
        if number != _REQUEST_SPANS:
            raise _UnusualError
        resource, scopes = _heading_and_rest(resource_spans)
        for scope_spans in scopes:
            scope, spans = _heading_and_rest(scope_spans)
            yield from (((resource, scope), span) for span in spans)


def _heading_and_rest(message: memoryview) -> tuple[bytes, list[memoryview]]:
    headings: list[memoryview] = []
    rest: list[memoryview] = []
    for number, payload in _fields(message):
        if number == _SPANS:
            rest.append(payload)
        elif number == _HEADING and not headings:  # A second one would be merged into the first.
            headings.append(payload)
        elif number != _SCHEMA_URL:
            raise _UnusualError
    return bytes(headings[0]) if headings else b"", rest


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Numbers and payloads."""
    place = 0
    while place < len(message):
        tag = message[place]
        if tag > 0x7F or tag & 7 != _LENGTH_DELIMITED:
            raise _UnusualError
        length, place = _varint(message, place + 1)
        if place + length > len(message):
            raise _UnusualError
        yield tag >> 3, message[place : place + length]
        place += length


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """The number that begins at `place`, and where it ends."""
    value = 0
    for number, byte in enumerate(message[place : place + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << 7 * number
        if byte < 0x80:
            return value, place + number + 1
    raise _UnusualError
