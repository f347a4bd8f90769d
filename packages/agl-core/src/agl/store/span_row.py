"""Spans as stores keep them: the OTLP bytes, and the columns to find them by.

A protobuf request is split by its field boundaries, into chunks of bounded size and one request for each span. Fields
are copied as they are, which is much faster than to serialise them again. Each chunk is parsed once, for the columns.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

from google.protobuf.descriptor import Descriptor
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2
from xxhash import xxh3_64_intdigest

from agl import otlp, semconv
from agl.errors import OtlpError
from agl.span import COLUMN_ATTRIBUTES, AttributeValue, Span, SpanAttributes
from agl.store.media import MIN_BYTES, media_of, media_span, without_media

_Attributes = Mapping[str, AttributeValue]

MAX_ID_LENGTH: Final = 500
"""Characters of a rollout id, an attempt id or a response id: an index entry of PostgreSQL has at most 2,700 bytes."""


_LENGTH_DELIMITED: Final = 2
_MAX_VARINT_BYTES: Final = 5
_REQUEST_RESOURCE_SPANS: Final = 1
"""Field of ExportTraceServiceRequest."""
_SPANS: Final = 2
"""Field `scope_spans` of ResourceSpans, and field `spans` of ScopeSpans."""

CHUNK_BYTES: Final = 2**20
"""Approximate size of a chunk. Bounds the memory for parsing, which takes ten times the size."""
MAX_TOTAL_BYTES: Final = 2**25
"""Limit for the spans of a request together, each with a copy of its resource, if four times its size is less."""
MAX_SPANS: Final = 2**15
"""Limit for the spans of a request from a sender. An empty span has 2 bytes, and takes hundreds in memory."""
_LEAST_FIELDS: Final = 2**17
_BYTES_PER_FIELD: Final = 16
"""Limit for the fields that are looked at: one for this many bytes of a request, or _LEAST_FIELDS."""
_MAX_DEPTH: Final = 100
"""As protobuf has it."""
_FIXED: Final = {1: 8, 5: 4}
"""Wire type to size in bytes."""

Stored = tuple[bytes | None, int | None, bytes, bytes, int]
"""Of a span in a store: OTLP bytes, checksum (None: stored before there were any), trace id, span id, start."""
_DAMAGED: Final = "it is not what was stored; `agl store check` lists all damage, `agl store repair` sets it aside"
_log = logging.getLogger(__name__)

Chunk = tuple[bytes, list[bytes]]
"""A request with several spans, and the same spans as one request each."""


@dataclass(slots=True)  # Not frozen: a frozen one takes three times as long to create.
class SpanRow:
    """One span. `otlp` is a protobuf request with this span alone, its resource and its scope."""

    trace_id: bytes
    span_id: bytes
    rollout_id: str | None
    """The rollout that the span names; None if it names none, or the implicit one, its trace."""
    attempt_id: str | None
    start_ns: int
    asked: str | None
    """Response id of a framework's span: the model response that it requested."""
    answered: str | None
    """Response id of a gateway call without a parent: the model response that it returned."""
    otlp: bytes
    mode: str | None = None
    """The mode that the span states, which is no column."""

    @staticmethod
    def of(span: Span) -> "SpanRow":
        """The row of `span`. Raises OtlpError on a value that OTLP cannot carry."""
        key = (bytes.fromhex(span.trace_id), bytes.fromhex(span.span_id), span.start_ns)
        return _to_row(*key, span, span.name, span.parent_id is not None, otlp.encode((span,)))


def rows_of(span: Span) -> Sequence[SpanRow]:
    """The row of `span`, and the rows of its media. Raises OtlpError on a value that OTLP cannot carry."""
    if any(name.startswith(semconv.MEDIA) for name in span.attributes):
        return parse(otlp.encode((span,))).all_rows()
    return (SpanRow.of(span),)


@dataclass(frozen=True, slots=True)
class ParsedSpans:
    """Rows of the valid spans and their media, and the number of rejected spans with the reason for the first."""

    rows: Sequence[SpanRow]
    rejected: int = 0
    reason: str = ""

    def all_rows(self) -> Sequence[SpanRow]:
        """The rows. Raises OtlpError if a span is rejected, for callers that store all or none."""
        if self.rejected:
            raise OtlpError(self.reason)
        return self.rows


def checksum(body: bytes) -> int:
    """xxh3 of the OTLP bytes of a span as a signed 64-bit number, stored beside them."""
    return xxh3_64_intdigest(body) - 2**63


def verified(rollout_id: str, found: Iterable[Stored]) -> list[bytes]:
    """The OTLP bytes of the spans of a rollout, `damaged_span` for those that are not what was stored."""
    return [
        body
        if body is not None and (known is None or checksum(body) == known)
        else damaged_span(rollout_id, trace_id, span_id, start_ns)
        for body, known, trace_id, span_id, start_ns in found
    ]


def damaged_span(rollout_id: str, trace_id: object, span_id: object, start_ns: object) -> bytes:
    """The span, as OTLP, in the place of one that is not what was stored: no call of its rollout trains.

    Its ids and start may be damaged too. It is logged.
    """
    trace, span = _valid_id(trace_id, 16), _valid_id(span_id, 8)
    at_ns = start_ns if isinstance(start_ns, int) and start_ns >= 0 else 0
    _log.error("span %s of rollout %s is damaged: %s", span, rollout_id, _DAMAGED)
    named = {semconv.ROLLOUT_ID: rollout_id}
    return otlp.encode((Span(trace, span, None, semconv.SPAN_DAMAGED, at_ns, at_ns, named, "error", _DAMAGED),))


def _valid_id(found: object, size: int) -> str:
    return (found if isinstance(found, bytes) and len(found) == size and any(found) else b"\xff" * size).hex()


def row_of(body: bytes) -> SpanRow:
    """The row of a span as it is stored, which an older version may have stored with its media.

    Raises OtlpError if `body` has no valid span.
    """
    rows = parse(body).all_rows()
    if not rows:
        raise OtlpError("expected a request with one span, got none")
    return rows[-1]  # After the rows of its media.


def attempt_ids(rows: Iterable[SpanRow]) -> list[str]:
    """The attempts that the spans name, sorted."""
    return sorted({row.attempt_id for row in rows if row.attempt_id})


def parse(body: bytes, max_spans: int | None = None) -> ParsedSpans:
    """Rows of a protobuf ExportTraceServiceRequest. Raises OtlpError if it is not one, or has over `max_spans`.

    Memory and time are bounded by the size of the body, whatever its number of elements: these are counted before
    objects are made of them.
    """
    fields = _Fields(len(body))
    try:
        chunks = split(body, fields, max_spans)
    except _UnsupportedEncodingError:
        fields.count_in(body)
        chunks = split(_canonical(otlp.parse(body)), fields, max_spans)
    rows: list[SpanRow] = []
    reasons: list[str] = []
    for chunk, requests in chunks:
        if len(chunk) > 2 * CHUNK_BYTES:
            fields.count_in(chunk)
        for part, encoded in _valid_parts(chunk, requests, reasons):
            for (span, resource), one in zip(_spans(part, fields), encoded, strict=True):
                try:
                    rows += _rows(span, resource, one)
                except OtlpError as error:
                    reasons.append(str(error))
    return ParsedSpans(rows, len(reasons), reasons[0] if reasons else "")


def _valid_parts(
    chunk: bytes, requests: list[bytes], reasons: list[str]
) -> Iterator[tuple[ExportTraceServiceRequest, list[bytes]]]:
    """The chunk; if it cannot be parsed, its spans one by one, and to `reasons` why some of these cannot be."""
    try:
        yield otlp.parse(chunk), requests
    except OtlpError:
        if not requests:
            raise
        for one in requests:
            try:
                yield otlp.parse(one), [one]
            except OtlpError as error:
                reasons.append(str(error))


def parse_json(body: bytes | str, max_spans: int | None = None) -> ParsedSpans:
    """Rows of an OTLP/JSON request. Raises OtlpError if it is not one, or has over `max_spans`."""
    request, reasons = otlp.parse_valid_json(body)
    parsed = parse(_canonical(request), max_spans)
    reasons += [parsed.reason] * parsed.rejected
    return ParsedSpans(parsed.rows, len(reasons), reasons[0] if reasons else "")


def _canonical(request: ExportTraceServiceRequest) -> bytes:
    """`request` in the standard encoding, without fields that are unknown to OTLP."""
    request.DiscardUnknownFields()
    return request.SerializeToString()


def _spans(request: ExportTraceServiceRequest, fields: "_Fields") -> Iterator[tuple[trace_pb2.Span, _Attributes]]:
    """Each span with the column attributes of its resource."""
    for resource_spans in request.resource_spans:
        fields.add(len(resource_spans.resource.attributes))
        resource = _attributes(resource_spans.resource.attributes)
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                fields.add(len(span.attributes))
                yield span, resource


def _attributes(pairs: Iterable[KeyValue]) -> _Attributes:
    """Those of the attributes that columns are read from."""
    return {
        key: value
        for pair in pairs
        if (key := pair.key) in COLUMN_ATTRIBUTES
        and (value := pair.value.string_value or otlp.read_value(pair.value)) is not None
    }


def _rows(span: trace_pb2.Span, resource: _Attributes, encoded: bytes) -> Iterator[SpanRow]:
    """The row of a span, and the rows of its media."""
    row = _row(span, resource, encoded)
    if len(encoded) >= MIN_BYTES and (media := media_of(span)):
        row.otlp = without_media(encoded)
        for digest, data in media.items():
            of_media = SpanRow.of(media_span(digest, data, row.rollout_id, row.trace_id, row.start_ns))
            of_media.mode = row.mode
            yield of_media
    yield row


def _row(span: trace_pb2.Span, resource: _Attributes, encoded: bytes) -> SpanRow:
    otlp.check_head(span)
    key = (span.trace_id, span.span_id, span.start_time_unix_nano)
    names = _ColumnAttributes(_attributes(span.attributes), resource)
    return _to_row(*key, names, span.name, otlp.has_parent(span), encoded)


@dataclass(slots=True)
class _ColumnAttributes(SpanAttributes):
    """A span with only the attributes that columns are read from."""

    attributes: _Attributes
    resource: _Attributes


def _to_row(
    trace_id: bytes, span_id: bytes, start_ns: int, names: SpanAttributes, name: str, has_parent: bool, encoded: bytes
) -> SpanRow:
    rollout_id, attempt_id, response_id = names.named_rollout, names.attempt_id, names.response_id
    for named in (rollout_id, attempt_id, response_id):
        if named is not None and len(named) > MAX_ID_LENGTH:
            raise OtlpError(f"span {name!r} names an id of {len(named)} characters, expected at most {MAX_ID_LENGTH}")
    named_rollout = rollout_id if rollout_id and rollout_id != trace_id.hex() else None
    by_gateway = name == semconv.SPAN_GATEWAY_CALL
    asked = None if by_gateway else response_id
    answered = response_id if by_gateway and not has_parent else None
    return SpanRow(
        trace_id, span_id, named_rollout, attempt_id, start_ns, asked, answered, encoded, names.text(semconv.MODE)
    )


class _UnsupportedEncodingError(Exception):
    """The request is broken, or encoded in a way that needs a protobuf parser."""


class _Fields:
    """Counts the fields of a request of `size` bytes that are looked at. Raises OtlpError if they are too many."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.left = max(size // _BYTES_PER_FIELD, _LEAST_FIELDS)

    def add(self, number: int) -> None:
        self.left -= number
        if self.left < 0:
            raise OtlpError(f"{self._size} bytes have too many fields, attributes or spans; send fewer at once")

    def count_in(self, body: bytes) -> None:
        """Count all fields of a request, at any depth: protobuf would make an object of each."""
        try:
            self._count(memoryview(body), ExportTraceServiceRequest.DESCRIPTOR, 0)
        except (IndexError, _UnsupportedEncodingError) as error:
            raise OtlpError(f"{self._size} bytes are not a protobuf ExportTraceServiceRequest") from error

    def _count(self, message: memoryview, kind: Descriptor, depth: int) -> None:
        position, size, inner = 0, len(message), _inner(kind)
        while position < size:
            self.add(1)
            tag, position = _varint(message, position)
            if tag & 7 == _LENGTH_DELIMITED:
                length, start = _varint(message, position)
                position = start + length
                if position <= size and depth < _MAX_DEPTH and (field := inner.get(tag >> 3)):
                    self._count(message[start:position], field, depth + 1)
            elif tag & 7 == 0:
                while message[position] > 0x7F:
                    position += 1
                position += 1
            else:
                position += _FIXED.get(tag & 7, size + 1)
        if position > size:
            raise _UnsupportedEncodingError


@cache
def _inner(kind: Descriptor) -> Mapping[int, Descriptor]:
    """The fields of a message that are messages themselves."""
    return {field.number: field.message_type for field in kind.fields if field.message_type}


def split(body: bytes, fields: _Fields | None = None, max_spans: int | None = None) -> Iterator[Chunk]:
    """Chunks with the spans of a trace request, in order, each of about CHUNK_BYTES or of one span.

    Raises _UnsupportedEncodingError, and OtlpError if there are more than `max_spans`, or if the spans, each with a
    copy of its resource, take more than four times the size of the body and more than MAX_TOTAL_BYTES.
    """
    requests: list[bytes] = []
    size = 0
    for request in _single_span_requests(memoryview(body), fields or _Fields(len(body))):
        requests.append(request)
        size += len(request)
        if max_spans is not None and len(requests) > max_spans:
            raise OtlpError(f"the request has over {max_spans} spans; send fewer at once")
        if size > max(MAX_TOTAL_BYTES, 4 * len(body)):
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


def _single_span_requests(body: memoryview, fields: _Fields) -> Iterator[bytes]:
    for number, resource_start, resource_end, _ in _fields(body):
        if number != _REQUEST_RESOURCE_SPANS:
            raise _UnsupportedEncodingError
        fields.add(1)
        resource, scopes = _separate_spans(body[resource_start:resource_end], fields)
        for scope_spans in scopes:
            scope, spans = _separate_spans(scope_spans, fields)
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


def _separate_spans(message: memoryview, counted: _Fields) -> tuple[bytes, list[memoryview]]:
    """The fields of a message except `_SPANS`, encoded as they are; and the payloads of its `_SPANS` fields."""
    payloads: list[memoryview] = []
    others: list[memoryview] = []
    for number, start, end, field_start in _fields(message):
        counted.add(1)
        if number == _SPANS:
            payloads.append(message[start:end])
        else:
            others.append(message[field_start:end])
    return b"".join(others), payloads


def _fields(message: memoryview) -> Iterator[tuple[int, int, int, int]]:
    """For each field: its number, start and end of its payload, start of the field."""
    position, size = 0, len(message)
    while position < size:
        tag = message[position]
        if tag > 0x7F or tag & 7 != _LENGTH_DELIMITED:
            raise _UnsupportedEncodingError
        length, start = _varint(message, position + 1)
        end = start + length
        if end > size:
            raise _UnsupportedEncodingError
        yield tag >> 3, start, end, position
        position = end


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """The number at `position`, and the position after it."""
    value = 0
    for number, byte in enumerate(message[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * number
        if byte < 0x80:
            return value, position + number + 1
    raise _UnsupportedEncodingError
