"""A span as stores keep it: its bytes, and the columns that it is found by.

What arrives is parsed once and cut into rows; no span is rebuilt from its attributes on the way in.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1 import trace_pb2

from agl import otlp, semconv
from agl.errors import OtlpError
from agl.span import COLUMN_ATTRIBUTES, AttributeValue, Named, Span
from agl.store.wire import cut, field

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


def read(body: bytes) -> Intake:
    """Rows of a protobuf ExportTraceServiceRequest. Raises OtlpError where it is none."""
    return _cut(map(otlp.parse, cut(body)))


def read_json(body: bytes | str) -> Intake:
    """Rows of an OTLP/JSON request. Raises OtlpError where it is none."""
    return _cut([otlp.parse_json(body)])


def _cut(requests: Iterable[ExportTraceServiceRequest]) -> Intake:
    rows: list[SpanRow] = []
    reasons: list[str] = []
    for span, resource, scope in chain.from_iterable(map(_spans, requests)):
        try:
            rows.append(_row(span, resource, scope))
        except OtlpError as error:
            reasons.append(str(error))
    return Intake(rows, len(reasons), reasons[0] if reasons else "")


@dataclass(frozen=True, slots=True)
class _Heading:
    """What spans of one resource share."""

    attributes: dict[str, AttributeValue]
    encoded: bytes


def _spans(request: ExportTraceServiceRequest) -> Iterator[tuple[trace_pb2.Span, _Heading, bytes]]:
    """Each span with its resource, and its scope as bytes."""
    for resource_spans in request.resource_spans:
        resource = resource_spans.resource
        heading = _Heading(otlp.read_attributes(resource.attributes), field(1, resource.SerializeToString()))
        for scope_spans in resource_spans.scope_spans:
            scope = field(1, scope_spans.scope.SerializeToString())
            for span in scope_spans.spans:
                yield span, heading, scope


def _row(span: trace_pb2.Span, resource: _Heading, scope: bytes) -> SpanRow:
    otlp.check_head(span)
    wanted = [pair for pair in span.attributes if pair.key in COLUMN_ATTRIBUTES]
    names = _Names(otlp.read_attributes(wanted), resource.attributes)
    # ExportTraceServiceRequest(resource_spans=[(resource, scope_spans=[(scope, spans=[span])])])
    in_scope = field(2, scope + field(2, span.SerializeToString()))
    encoded = field(1, resource.encoded + in_scope)
    key = (span.trace_id, span.span_id, span.start_time_unix_nano)
    return _to_row(*key, names, span.name, otlp.has_parent(span), encoded)


@dataclass(slots=True)
class _Names(Named):
    """The few attributes that columns are made of."""

    attributes: Mapping[str, AttributeValue]
    resource: Mapping[str, AttributeValue]


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
        rollout_id if rollout_id != trace_id.hex() else None,
        attempt_id,
        start_ns,
        None if by_gateway else response_id,
        response_id if by_gateway and not has_parent else None,
        encoded,
    )
