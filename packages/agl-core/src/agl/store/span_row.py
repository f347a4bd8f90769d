"""A span as stores keep it: its bytes, and the columns that it is found by.

What arrives is parsed once and cut into rows; no span is rebuilt from its attributes on the way in.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

from agl import otlp, semconv
from agl.errors import OtlpError
from agl.span import COLUMN_ATTRIBUTES, AttributeValue, Named, Span
from agl.store import otlp_cut

_Attributes = Mapping[str, AttributeValue]

_LONGEST_ID: Final = 500
"""Characters of a rollout, an attempt or an answer: PostgreSQL's indexes hold 2,700 bytes."""


@dataclass(slots=True)  # Not frozen: that would take three times as long to make.
class SpanRow:
    """One span. `otlp` is the protobuf request that would carry it alone, with its resource and scope."""

    trace_id: bytes
    span_id: bytes
    rollout_id: str | None
    """The rollout that the span names; None where that is its trace, the implicit one."""
    attempt_id: str | None
    start_ns: int
    asked: str | None
    """Id of the answer, on a span that tells of a request."""
    answered: str | None
    """Id of the answer, on a gateway's call that has no parent."""
    otlp: bytes

    @staticmethod
    def of(span: Span) -> "SpanRow":
        """The row of `span`. Raises OtlpError on a value that OTLP cannot carry."""
        key = (bytes.fromhex(span.trace_id), bytes.fromhex(span.span_id), span.start_ns)
        return _to_row(*key, span, span.name, span.parent_id is not None, otlp.encode((span,)))


@dataclass(frozen=True, slots=True)
class Intake:
    """What a request brought: the rows to keep, and how many spans are refused for good, with the first reason."""

    rows: Sequence[SpanRow]
    refused: int = 0
    reason: str = ""

    def all_rows(self) -> Sequence[SpanRow]:
        """The rows. Raises OtlpError where a span is refused: who calls this keeps all or none."""
        if self.refused:
            raise OtlpError(self.reason)
        return self.rows


def read(body: bytes) -> Intake:
    """Rows of a protobuf ExportTraceServiceRequest. Raises OtlpError where it is none."""
    try:
        pieces = otlp_cut.cut(body)
    except otlp_cut.UnusualError:
        pieces = otlp_cut.cut(_as_usual(otlp.parse(body)))
    rows: list[SpanRow] = []
    reasons: list[str] = []
    for piece, alone in pieces:
        for (span, resource), encoded in zip(_spans(otlp.parse(piece)), alone, strict=True):
            try:
                rows.append(_row(span, resource, encoded))
            except OtlpError as error:
                reasons.append(str(error))
    return Intake(rows, len(reasons), reasons[0] if reasons else "")


def read_json(body: bytes | str) -> Intake:
    """Rows of an OTLP/JSON request. Raises OtlpError where it is none."""
    return read(_as_usual(otlp.parse_json(body)))


def _as_usual(request: ExportTraceServiceRequest) -> bytes:
    """`request` as everybody writes it: without what OTLP does not know."""
    request.DiscardUnknownFields()
    return request.SerializeToString()


def _spans(request: ExportTraceServiceRequest) -> Iterator[tuple[trace_pb2.Span, _Attributes]]:
    """Each span with what its resource says of where it belongs."""
    for resource_spans in request.resource_spans:
        resource = _attributes(resource_spans.resource.attributes)
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                yield span, resource


def _attributes(pairs: Iterable[KeyValue]) -> _Attributes:
    """The few that columns are made of."""
    return {
        key: value
        for pair in pairs
        if (key := pair.key) in COLUMN_ATTRIBUTES
        and (value := pair.value.string_value or otlp.read_value(pair.value)) is not None
    }


def _row(span: trace_pb2.Span, resource: _Attributes, encoded: bytes) -> SpanRow:
    otlp.check_head(span)
    key = (span.trace_id, span.span_id, span.start_time_unix_nano)
    names = _Names(_attributes(span.attributes), resource)
    return _to_row(*key, names, span.name, otlp.has_parent(span), encoded)


@dataclass(slots=True)
class _Names(Named):
    """The few attributes that columns are made of."""

    attributes: _Attributes
    resource: _Attributes


def _to_row(
    trace_id: bytes, span_id: bytes, start_ns: int, names: Named, name: str, has_parent: bool, encoded: bytes
) -> SpanRow:
    rollout_id, attempt_id, response_id = names.named_rollout, names.attempt_id, names.response_id
    for named in (rollout_id, attempt_id, response_id):
        if named is not None and len(named) > _LONGEST_ID:
            raise OtlpError(f"span {name!r} names an id of {len(named)} characters, expected at most {_LONGEST_ID}")
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
