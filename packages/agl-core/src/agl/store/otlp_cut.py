"""Protobuf requests by their bytes alone: a large request cut into small ones, and those into one for each span."""

from collections.abc import Iterator
from typing import Final

from agl.errors import OtlpError

_LENGTH_DELIMITED: Final = 2
_LONGEST_VARINT: Final = 5
# Of ExportTraceServiceRequest, ResourceSpans and ScopeSpans: what has the spans in it.
_REQUEST_SPANS: Final = 1
_SPANS: Final = 2

PIECE_BYTES: Final = 2**20
"""A request is parsed in pieces of about this size: parsed it takes ten times its own."""
MOST_BYTES: Final = 2**28
"""Of all spans of a request: a long resource is kept with each of them."""

Piece = tuple[bytes, list[bytes]]
"""A request of several spans, and the requests that would carry each of them alone."""


class UnusualError(Exception):
    """Something that only a parser of protobuf can judge."""


def cut(body: bytes) -> Iterator[Piece]:
    """Pieces that together have the spans of a trace request, in order, each of one span or about PIECE_BYTES.

    Nothing is parsed but where fields begin and end; what is said of the spans is taken over as it stands. Raises
    UnusualError where the body is broken, or not made in the usual way, and OtlpError where the spans, each with a copy
    of its resource, would take twice the body and over MOST_BYTES.
    """
    alone: list[bytes] = []
    size = 0
    for request in _alone(memoryview(body)):
        alone.append(request)
        size += len(request)
        if size > max(MOST_BYTES, 2 * len(body)):
            raise OtlpError(f"the spans of {len(body)} bytes take over {size} with their resource; send fewer at once")
    if len(body) <= PIECE_BYTES:
        return iter(((body, alone),))
    return _grouped(alone)


def _grouped(alone: list[bytes]) -> Iterator[Piece]:
    group: list[bytes] = []
    size = 0
    for request in alone:
        if group and size + len(request) > PIECE_BYTES:
            yield b"".join(group), group
            group, size = [], 0
        group.append(request)
        size += len(request)
    if group:
        yield b"".join(group), group


def _alone(body: memoryview) -> Iterator[bytes]:
    """Each span as the request that would carry it alone."""
    for number, resource_start, resource_end, _ in _fields(body):
        if number != _REQUEST_SPANS:
            raise UnusualError
        resource, scopes = _divide(body[resource_start:resource_end])
        for scope_spans in scopes:
            scope, spans = _divide(scope_spans)
            for span in spans:
                in_scope = scope + _head(_SPANS, len(span))
                in_resource = resource + _head(_SPANS, len(in_scope) + len(span)) + in_scope
                yield b"".join((_head(_REQUEST_SPANS, len(in_resource) + len(span)), in_resource, span))


def _head(number: int, length: int) -> bytes:
    """What stands before the payload of a length-delimited field: its tag, and its length as varint."""
    head = (number << 3 | _LENGTH_DELIMITED,)
    if length < 0x4000:  # nearly all: one byte, or two
        head += (length,) if length < 0x80 else (length & 0x7F | 0x80, length >> 7)
        return bytes(head)
    varint = bytearray(head)
    while length > 0x7F:
        varint.append(length & 0x7F | 0x80)
        length >>= 7
    varint.append(length)
    return bytes(varint)


def _divide(message: memoryview) -> tuple[bytes, list[memoryview]]:
    """The fields that say something of the spans, as they stand, and the payloads that have the spans in them."""
    rest: list[memoryview] = []
    heading = b""
    for number, start, end, place in _fields(message):
        if number == _SPANS:
            rest.append(message[start:end])
        else:
            heading += message[place:end]
    return heading, rest


def _fields(message: memoryview) -> Iterator[tuple[int, int, int, int]]:
    """Of each field its number, where its payload begins and ends, and where it begins itself."""
    place, size = 0, len(message)
    while place < size:
        tag = message[place]
        if tag > 0x7F or tag & 7 != _LENGTH_DELIMITED:
            raise UnusualError
        length, start = _varint(message, place + 1)
        end = start + length
        if end > size:
            raise UnusualError
        yield tag >> 3, start, end, place
        place = end


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """The number that begins at `place`, and where it ends."""
    value = 0
    for number, byte in enumerate(message[place : place + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << 7 * number
        if byte < 0x80:
            return value, place + number + 1
    raise UnusualError
