"""Split protobuf trace requests by their bytes: into chunks of bounded size, and into one request for each span.

Reads field boundaries only and copies all fields as they are, which is much faster than parsing and serialising.
"""

from collections.abc import Iterator
from typing import Final

from agl.errors import OtlpError

_LENGTH_DELIMITED: Final = 2
_MAX_VARINT_BYTES: Final = 5
_REQUEST_RESOURCE_SPANS: Final = 1
"""Field of ExportTraceServiceRequest."""
_SPANS: Final = 2
"""Field `scope_spans` of ResourceSpans, and field `spans` of ScopeSpans."""

CHUNK_BYTES: Final = 2**20
"""Approximate size of a chunk. Bounds the memory for parsing, which takes ten times the size."""
MAX_TOTAL_BYTES: Final = 2**28
"""Limit for the spans of a request together, each with a copy of its resource."""

Chunk = tuple[bytes, list[bytes]]
"""A request with several spans, and the same spans as one request each."""


class UnsupportedEncodingError(Exception):
    """The request is broken, or encoded in a way that needs a protobuf parser."""


def split(body: bytes) -> Iterator[Chunk]:
    """Chunks with the spans of a trace request, in order, each of about CHUNK_BYTES or of one span.

    Raises UnsupportedEncodingError, and OtlpError if the spans, each with a copy of its resource, take more than twice
    the size of the body and more than MAX_TOTAL_BYTES.
    """
    requests: list[bytes] = []
    size = 0
    for request in _single_span_requests(memoryview(body)):
        requests.append(request)
        size += len(request)
        if size > max(MAX_TOTAL_BYTES, 2 * len(body)):
            raise OtlpError(f"the spans of {len(body)} bytes take over {size} with their resource; send fewer at once")
    if len(body) <= CHUNK_BYTES:
        return iter(((body, requests),))
    return _chunks(requests)


def _chunks(requests: list[bytes]) -> Iterator[Chunk]:
    chunk: list[bytes] = []
    size = 0
    for request in requests:
        if chunk and size + len(request) > CHUNK_BYTES:
            yield b"".join(chunk), chunk
            chunk, size = [], 0
        chunk.append(request)
        size += len(request)
    if chunk:
        yield b"".join(chunk), chunk


def _single_span_requests(body: memoryview) -> Iterator[bytes]:
    for number, resource_start, resource_end, _ in _fields(body):
        if number != _REQUEST_RESOURCE_SPANS:
            raise UnsupportedEncodingError
        resource, scopes = _separate_spans(body[resource_start:resource_end])
        for scope_spans in scopes:
            scope, spans = _separate_spans(scope_spans)
            for span in spans:
                in_scope = scope + _field_header(_SPANS, len(span))
                in_resource = resource + _field_header(_SPANS, len(in_scope) + len(span)) + in_scope
                header = _field_header(_REQUEST_RESOURCE_SPANS, len(in_resource) + len(span))
                yield b"".join((header, in_resource, span))


def _field_header(number: int, length: int) -> bytes:
    """Tag and length of a length-delimited field."""
    header = (number << 3 | _LENGTH_DELIMITED,)
    if length < 0x4000:  # Fast path for nearly all fields: a varint of one or two bytes.
        header += (length,) if length < 0x80 else (length & 0x7F | 0x80, length >> 7)
        return bytes(header)
    varint = bytearray(header)
    while length > 0x7F:
        varint.append(length & 0x7F | 0x80)
        length >>= 7
    varint.append(length)
    return bytes(varint)


def _separate_spans(message: memoryview) -> tuple[bytes, list[memoryview]]:
    """The fields of a message except `_SPANS`, encoded as they are; and the payloads of its `_SPANS` fields."""
    payloads: list[memoryview] = []
    others = b""
    for number, start, end, field_start in _fields(message):
        if number == _SPANS:
            payloads.append(message[start:end])
        else:
            others += message[field_start:end]
    return others, payloads


def _fields(message: memoryview) -> Iterator[tuple[int, int, int, int]]:
    """For each field: its number, start and end of its payload, start of the field."""
    position, size = 0, len(message)
    while position < size:
        tag = message[position]
        if tag > 0x7F or tag & 7 != _LENGTH_DELIMITED:
            raise UnsupportedEncodingError
        length, start = _varint(message, position + 1)
        end = start + length
        if end > size:
            raise UnsupportedEncodingError
        yield tag >> 3, start, end, position
        position = end


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """The number at `position`, and the position after it."""
    value = 0
    for number, byte in enumerate(message[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * number
        if byte < 0x80:
            return value, position + number + 1
    raise UnsupportedEncodingError
