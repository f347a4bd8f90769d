"""Spans as stores keep them: the OTLP bytes, and the columns to find them by.

An incoming request is parsed once, for the columns only: spans are never rebuilt from their attributes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

from agl import otlp, semconv
from agl.errors import OtlpError
from agl.span import COLUMN_ATTRIBUTES, AttributeValue, Span, SpanAttributes
from agl.store import otlp_split

_Attributes = Mapping[str, AttributeValue]

_MAX_ID_LENGTH: Final = 500
"""Characters of a rollout id, an attempt id or a response id: an index entry of PostgreSQL has at most 2,700 bytes."""


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

    @staticmethod
    def of(span: Span) -> "SpanRow":
        """The row of `span`. Raises OtlpError on a value that OTLP cannot carry."""
        key = (bytes.fromhex(span.trace_id), bytes.fromhex(span.span_id), span.start_ns)
        return _to_row(*key, span, span.name, span.parent_id is not None, otlp.encode((span,)))


@dataclass(frozen=True, slots=True)
class ParsedSpans:
    """The valid spans of a request, and the number of rejected spans with the reason for the first."""

    rows: Sequence[SpanRow]
    rejected: int = 0
    reason: str = ""

    def all_rows(self) -> Sequence[SpanRow]:
        """The rows. Raises OtlpError if a span is rejected, for callers that store all or none."""
        if self.rejected:
            raise OtlpError(self.reason)
        return self.rows


def attempt_ids(rows: Iterable[SpanRow]) -> list[str]:
    """The attempts that the spans name, sorted."""
    return sorted({row.attempt_id for row in rows if row.attempt_id})


def parse(body: bytes) -> ParsedSpans:
    """Rows of a protobuf ExportTraceServiceRequest. Raises OtlpError if it is not one."""
    try:
        chunks = otlp_split.split(body)
    except otlp_split.UnsupportedEncodingError:
        chunks = otlp_split.split(_canonical(otlp.parse(body)))
    rows: list[SpanRow] = []
    reasons: list[str] = []
    for chunk, requests in chunks:
        for (span, resource), encoded in zip(_spans(otlp.parse(chunk)), requests, strict=True):
            try:
                rows.append(_row(span, resource, encoded))
            except OtlpError as error:
                reasons.append(str(error))
    return ParsedSpans(rows, len(reasons), reasons[0] if reasons else "")


def parse_json(body: bytes | str) -> ParsedSpans:
    """Rows of an OTLP/JSON request. Raises OtlpError if it is not one."""
    return parse(_canonical(otlp.parse_json(body)))


def _canonical(request: ExportTraceServiceRequest) -> bytes:
    """`request` in the standard encoding, without fields that are unknown to OTLP."""
    request.DiscardUnknownFields()
    return request.SerializeToString()


def _spans(request: ExportTraceServiceRequest) -> Iterator[tuple[trace_pb2.Span, _Attributes]]:
    """Each span with the column attributes of its resource."""
    for resource_spans in request.resource_spans:
        resource = _attributes(resource_spans.resource.attributes)
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                yield span, resource


def _attributes(pairs: Iterable[KeyValue]) -> _Attributes:
    """Those of the attributes that columns are read from."""
    return {
        key: value
        for pair in pairs
        if (key := pair.key) in COLUMN_ATTRIBUTES
        and (value := pair.value.string_value or otlp.read_value(pair.value)) is not None
    }


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
        if named is not None and len(named) > _MAX_ID_LENGTH:
            raise OtlpError(f"span {name!r} names an id of {len(named)} characters, expected at most {_MAX_ID_LENGTH}")
    by_gateway = name == semconv.SPAN_GATEWAY_CALL
    return SpanRow(
        trace_id,
        span_id,
        rollout_id if rollout_id and rollout_id != trace_id.hex() else None,
        attempt_id,
        start_ns,
        None if by_gateway else response_id,
        response_id if by_gateway and not has_parent else None,
        encoded,
    )
