"""Encodes and decodes OTLP trace requests, in protobuf and JSON, from and to `agl.span.Span`.

Concatenated protobuf requests are one valid request with all their spans; stores, which keep one per span, rely on it.
"""

import base64
import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1 import trace_pb2

from agl.errors import OtlpError
from agl.span import AttributeValue, Span, SpanEvent, Status

_STATUS_OF_CODE: dict[int, Status] = {0: "unset", 1: "ok", 2: "error"}
_CODE_OF_STATUS = {status: code for code, status in _STATUS_OF_CODE.items()}
_ID_FIELDS = ("traceId", "spanId", "parentSpanId")
_SCALARS: dict[str | None, Callable[[AnyValue], Any]] = {
    kind: attrgetter(kind) for kind in ("string_value", "bool_value", "int_value", "double_value")
}
_LAST_NS = 2**63 - 1


def decode(body: bytes) -> list[Span]:
    """Spans of a protobuf ExportTraceServiceRequest. Raises OtlpError if any of them is invalid."""
    return _read_request(parse(body))


def decode_json(body: bytes | str) -> list[Span]:
    """Spans of an OTLP/JSON request. Raises OtlpError if any of them is invalid."""
    return _read_request(parse_json(body))


def parse(body: bytes) -> ExportTraceServiceRequest:
    """The protobuf request, with its spans unchecked. Raises OtlpError."""
    try:
        return ExportTraceServiceRequest.FromString(body)
    except DecodeError as error:
        raise OtlpError(f"{len(body)} bytes are not a protobuf ExportTraceServiceRequest: {error}") from error


def parse_json(body: bytes | str) -> ExportTraceServiceRequest:
    """The request of an OTLP/JSON body (hex ids, base64 bytes, 64-bit integers as strings). Raises OtlpError."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise OtlpError(f"the body is not an OTLP/JSON trace request: {error}") from error
    return _read_json(data)


def parse_valid_json(body: bytes | str) -> tuple[ExportTraceServiceRequest, list[str]]:
    """The request of an OTLP/JSON body without its invalid spans, and a reason for each of these.

    A span whose resource or scope is invalid is, too. Raises OtlpError if the body has not the form of such a request.
    """
    try:
        return parse_json(body), []
    except OtlpError as error:
        whole = error
    request, reasons = ExportTraceServiceRequest(), list[str]()
    try:
        for group in json.loads(body)["resourceSpans"]:
            for scope in group["scopeSpans"]:
                spans, scope["spans"] = scope["spans"], []
                for span in spans:
                    fault = _json_fault({"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]})
                    reasons.append(fault) if fault else scope["spans"].append(span)
            if fault := _json_fault({"resourceSpans": [group]}):
                reasons += [fault for scope in group["scopeSpans"] for _ in scope["spans"]]
            else:
                request.MergeFrom(_read_json({"resourceSpans": [group]}))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise whole from None
    return request, reasons


def _json_fault(data: Any) -> str:
    """Why `data` is no request; empty if it is one."""
    try:
        _read_json(copy.deepcopy(data))
    except OtlpError as error:
        return str(error)
    return ""


def _read_json(data: Any) -> ExportTraceServiceRequest:
    """The request of the JSON `data`, which is changed. Raises OtlpError."""
    request = ExportTraceServiceRequest()
    try:
        _convert_ids(data, lambda text: base64.b64encode(bytes.fromhex(text)).decode())
        json_format.ParseDict(data, request, ignore_unknown_fields=True)
    # A wrong type inside the body raises any of these, by its position; an unpaired surrogate in a key, SystemError.
    except (ValueError, TypeError, AttributeError, RecursionError, SystemError, json_format.ParseError) as error:
        raise OtlpError(f"the body is not an OTLP/JSON trace request: {error}") from error
    return request


def encode(spans: Iterable[Span]) -> bytes:
    """Protobuf ExportTraceServiceRequest with `spans`. Raises OtlpError for a value that OTLP cannot represent."""
    return _write_request(spans).SerializeToString()


def encode_json(spans: Iterable[Span]) -> str:
    """OTLP/JSON request with `spans`, on one line. Raises OtlpError for a value that OTLP cannot represent."""
    return _write_json(_write_request(spans))


def to_json(bodies: Iterable[bytes]) -> str:
    """The protobuf requests `bodies` as one OTLP/JSON request, on one line, with every field kept."""
    whole = ExportTraceServiceRequest()
    for body in bodies:
        for resource_spans in parse(body).resource_spans:
            for scope_spans in resource_spans.scope_spans:
                _add_spans(whole, resource_spans, scope_spans)
    return _write_json(whole)


def with_trace_state(body: bytes, change: Callable[[str], str]) -> bytes:
    """The protobuf request `body` with the trace state of each of its spans changed."""
    request = parse(body)
    for resource_spans in request.resource_spans:
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                span.trace_state = change(span.trace_state)
    return request.SerializeToString()


def _add_spans(
    request: ExportTraceServiceRequest, resource_spans: trace_pb2.ResourceSpans, scope_spans: trace_pb2.ScopeSpans
) -> None:
    """Add the spans of `scope_spans` with their resource and scope, which equal neighbours share."""
    outer = request.resource_spans[-1] if request.resource_spans else None
    if outer is None or (outer.resource, outer.schema_url) != (resource_spans.resource, resource_spans.schema_url):
        outer = request.resource_spans.add(resource=resource_spans.resource, schema_url=resource_spans.schema_url)
    inner = outer.scope_spans[-1] if outer.scope_spans else None
    if inner is None or (inner.scope, inner.schema_url) != (scope_spans.scope, scope_spans.schema_url):
        inner = outer.scope_spans.add(scope=scope_spans.scope, schema_url=scope_spans.schema_url)
    inner.spans.extend(scope_spans.spans)


def _write_json(request: ExportTraceServiceRequest) -> str:
    data = json_format.MessageToDict(request, use_integers_for_enums=True)
    _convert_ids(data, lambda text: base64.b64decode(text).hex())
    return json.dumps(data, separators=(",", ":"))


def _convert_ids(data: Any, convert: Callable[[str], str]) -> None:
    """Convert the ids of every span in place: OTLP/JSON has hex where protobuf's own JSON has base64."""
    for resource_spans in data.get("resourceSpans") or ():
        for scope_spans in resource_spans.get("scopeSpans") or ():
            for span in scope_spans.get("spans") or ():
                for holder in (span, *(span.get("links") or ())):
                    holder.update({name: convert(holder[name]) for name in _ID_FIELDS if holder.get(name)})


def _read_request(request: ExportTraceServiceRequest) -> list[Span]:
    spans: list[Span] = []
    for resource_spans in request.resource_spans:
        resource = read_attributes(resource_spans.resource.attributes)
        for scope_spans in resource_spans.scope_spans:
            scope = scope_spans.scope.name
            spans.extend(_read_span(span, resource, scope) for span in scope_spans.spans)
    return spans


def _read_span(span: trace_pb2.Span, resource: dict[str, AttributeValue], scope: str) -> Span:
    check_head(span)
    return Span(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex() if has_parent(span) else None,
        name=span.name,
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=read_attributes(span.attributes),
        status=_STATUS_OF_CODE.get(span.status.code, "unset"),
        status_message=span.status.message,
        kind=span.kind,
        events=tuple(_read_event(event) for event in span.events),
        resource=resource,
        scope=scope,
    )


def has_parent(span: trace_pb2.Span) -> bool:
    """Whether `span` names a parent; an id of zeros does not count."""
    return bool(span.parent_span_id.strip(b"\0"))


def check_head(span: trace_pb2.Span) -> None:
    """Raises OtlpError for invalid ids and times."""
    _check_id(span.trace_id, 16, "trace id", span)
    _check_id(span.span_id, 8, "span id", span)
    if has_parent(span):
        _check_id(span.parent_span_id, 8, "parent id", span)
    _read_time(span.start_time_unix_nano, span.name)
    _read_time(span.end_time_unix_nano, span.name)


def _read_event(event: trace_pb2.Span.Event) -> SpanEvent:
    return SpanEvent(event.name, _read_time(event.time_unix_nano, event.name), read_attributes(event.attributes))


def _check_id(value: bytes, size: int, what: str, span: trace_pb2.Span) -> None:
    if len(value) != size or value == bytes(size):
        raise OtlpError(f"span {span.name!r} has the {what} {value.hex()!r}, expected {size} bytes, not all zero")


def _read_time(value: int, name: str) -> int:
    if value > _LAST_NS:
        raise OtlpError(f"{name!r} has the time {value} ns, expected at most {_LAST_NS} (year 2262)")
    return value


def read_attributes(pairs: Iterable[KeyValue]) -> dict[str, AttributeValue]:
    return {pair.key: value for pair in pairs if (value := read_value(pair.value)) is not None}


def read_value(value: AnyValue) -> AttributeValue | None:
    """A plain value; maps and mixed or nested arrays, which attributes cannot hold, become JSON text."""
    kind = value.WhichOneof("value")
    if kind is None:
        return None
    if kind == "array_value":
        return _read_array(value.array_value.values)
    if kind == "kvlist_value":
        return json.dumps(_to_json(value))
    return getattr(value, kind)


def _read_array(values: Sequence[AnyValue]) -> AttributeValue:
    kinds = {value.WhichOneof("value") for value in values}
    if len(kinds) <= 1 and kinds <= _SCALARS.keys():
        return [_SCALARS[kind](value) for kind in kinds for value in values]
    items = [_to_json(value) for value in values]
    return [float(item) for item in items] if kinds == {"int_value", "double_value"} else json.dumps(items)


def _to_json(value: AnyValue) -> Any:
    """`value` as a JSON value; bytes become base64."""
    kind = value.WhichOneof("value")
    if kind is None:
        return None
    if kind == "array_value":
        return [_to_json(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return {pair.key: _to_json(pair.value) for pair in value.kvlist_value.values}
    plain = getattr(value, kind)
    return base64.b64encode(plain).decode() if kind == "bytes_value" else plain


def _write_request(spans: Iterable[Span]) -> ExportTraceServiceRequest:
    request = ExportTraceServiceRequest()
    previous: Span | None = None
    for span in spans:
        try:
            _add_span(request, span, previous)
        except (TypeError, ValueError) as error:
            raise OtlpError(f"span {span.name!r} ({span.span_id}) cannot be written as OTLP: {error}") from error
        previous = span
    return request


def _add_span(request: ExportTraceServiceRequest, span: Span, previous: Span | None) -> None:
    """Add `span`, in the group of `previous` if its resource and scope are equal."""
    if previous is None or span.resource != previous.resource or span.scope != previous.scope:
        resource = Resource(attributes=_write_attributes(span.resource))
        request.resource_spans.add(resource=resource).scope_spans.add(scope=InstrumentationScope(name=span.scope))
    request.resource_spans[-1].scope_spans[-1].spans.append(_write_span(span))


def _write_span(span: Span) -> trace_pb2.Span:
    return trace_pb2.Span(
        trace_id=bytes.fromhex(span.trace_id),
        span_id=bytes.fromhex(span.span_id),
        parent_span_id=bytes.fromhex(span.parent_id or ""),
        name=span.name,
        kind=trace_pb2.Span.SpanKind.ValueType(span.kind),
        start_time_unix_nano=span.start_ns,
        end_time_unix_nano=span.end_ns,
        attributes=_write_attributes(span.attributes),
        events=[_write_event(event) for event in span.events],
        status=trace_pb2.Status(
            code=trace_pb2.Status.StatusCode.ValueType(_CODE_OF_STATUS[span.status]), message=span.status_message
        ),
    )


def _write_event(event: SpanEvent) -> trace_pb2.Span.Event:
    attributes = _write_attributes(event.attributes)
    return trace_pb2.Span.Event(name=event.name, time_unix_nano=event.time_ns, attributes=attributes)


def _write_attributes(attributes: Mapping[str, AttributeValue]) -> list[KeyValue]:
    return [KeyValue(key=key, value=_write_value(value)) for key, value in attributes.items()]


def _write_value(value: AttributeValue) -> AnyValue:
    match value:
        case str():
            return AnyValue(string_value=value)
        case bool():
            return AnyValue(bool_value=value)
        case int():
            return AnyValue(int_value=value)
        case float():
            return AnyValue(double_value=value)
        case bytes():
            return AnyValue(bytes_value=value)
        case list() | tuple():
            return AnyValue(array_value=ArrayValue(values=[_write_value(item) for item in value]))
        case _:
            raise TypeError(f"a value is {type(value).__name__}, expected str, bool, int, float, bytes or list")
