"""OTLP bodies to spans and back, checked with the encoder of the OpenTelemetry SDK and the OTLP/JSON specification."""

import json
import math
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from agl import otlp
from agl.errors import OtlpError
from agl.span import Span, SpanEvent

TRACE = "5b8efff798038103d269b633813fc60c"
SPAN = "eee19b7ec3c1b174"

FULL = Span(
    trace_id=TRACE,
    span_id=SPAN,
    parent_id="eee19b7ec3c1b173",
    name="chat writer",
    start_ns=1_544_712_660_000_000_000,
    end_ns=1_544_712_661_000_000_000,
    attributes={
        "text": "t",
        "yes": False,
        "whole": 2**53 + 1,
        "real": 0.5,
        "raw": b"\x00\xff",
        "ids": [1, 2],
        "none": [],
    },
    status="error",
    status_message="boom",
    kind=3,
    events=(SpanEvent("exception", 7, {"exception.type": "ValueError"}),),
    resource={"service.name": "agent"},
    scope="agl.test",
)
"""A span with every field set."""


def json_request(**span: Any) -> str:
    return json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": TRACE, "spanId": SPAN} | span]}]}]})


def value_request(value: dict[str, Any]) -> str:
    return json_request(attributes=[{"key": "key", "value": value}])


def test_what_the_sdk_encodes_is_decoded() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource({"service.name": "agent"}))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("scope")
    with tracer.start_as_current_span("outer"), tracer.start_as_current_span("inner", kind=SpanKind.CLIENT) as span:
        span.set_attributes({"ids": [1, 2], "raw": b"\x01\x02", "real": 1.0})
        span.add_event("seen", {"n": 1})
        span.set_status(StatusCode.ERROR, "boom")
    inner, outer = otlp.decode(encode_spans(exporter.get_finished_spans()).SerializeToString())
    assert (inner.trace_id, inner.parent_id) == (outer.trace_id, outer.span_id)
    assert outer.parent_id is None
    assert inner.attributes == {"ids": [1, 2], "raw": b"\x01\x02", "real": 1.0}
    assert (inner.status, inner.status_message, inner.kind) == ("error", "boom", 3)
    assert [(event.name, event.attributes) for event in inner.events] == [("seen", {"n": 1})]
    assert (inner.resource["service.name"], inner.scope) == ("agent", "scope")
    assert inner.end_ns >= inner.start_ns > 1_600_000_000_000_000_000


@pytest.mark.parametrize("form", ["protobuf", "json"])
def test_every_field_survives_a_round_trip(form: str) -> None:
    other = Span("a" * 32, "b" * 16, None, "root", 1, 2, {"inf": math.inf}, resource={"service.name": "other"})
    spans = [FULL, FULL, other]
    body = otlp.encode(spans) if form == "protobuf" else otlp.encode_json(spans)
    assert (otlp.decode(body) if isinstance(body, bytes) else otlp.decode_json(body)) == spans


def test_neighbours_with_one_resource_share_it() -> None:
    request = ExportTraceServiceRequest.FromString(otlp.encode([FULL, FULL]))
    assert [len(group.scope_spans[0].spans) for group in request.resource_spans] == [2]


def test_concatenated_requests_decode_to_the_spans_of_both() -> None:
    assert otlp.decode(otlp.encode([FULL]) * 2) == [FULL, FULL]
    assert otlp.decode(b"") == []


def test_json_has_hex_ids_and_integers_as_strings() -> None:
    line = otlp.encode_json([FULL])
    assert "\n" not in line
    span = json.loads(line)["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    assert (span["traceId"], span["spanId"], span["parentSpanId"]) == (TRACE, SPAN, FULL.parent_id)
    assert (span["kind"], span["status"]["code"]) == (3, 2)
    assert span["startTimeUnixNano"] == "1544712660000000000"
    assert {"key": "whole", "value": {"intValue": "9007199254740993"}} in span["attributes"]
    assert {"key": "raw", "value": {"bytesValue": "AP8="}} in span["attributes"]


def test_json_of_the_specification_is_read() -> None:
    body = json_request(
        traceId=TRACE.upper(),
        parentSpanId="",
        name="server",
        startTimeUnixNano="1544712660000000000",
        endTimeUnixNano=1544712661000000000,
        kind=2,
        status={},
        links=[{"traceId": TRACE, "spanId": SPAN}],
        someFutureField={"x": 1},
    )
    (span,) = otlp.decode_json(body)
    assert (span.trace_id, span.span_id, span.parent_id) == (TRACE, SPAN, None)
    assert (span.start_ns, span.end_ns) == (1544712660000000000, 1544712661000000000)
    assert (span.kind, span.status, span.resource) == (2, "unset", {})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"stringValue": "x"}, "x"),
        ({"boolValue": False}, False),
        ({"intValue": "9223372036854775807"}, 2**63 - 1),
        ({"intValue": 5}, 5),
        ({"doubleValue": 3}, 3.0),
        ({"doubleValue": "Infinity"}, math.inf),
        ({"bytesValue": "AAEC/w=="}, b"\x00\x01\x02\xff"),
        ({"arrayValue": {"values": []}}, []),
        ({"arrayValue": {"values": [{"intValue": "1"}, {"doubleValue": 2.5}]}}, [1.0, 2.5]),
        ({"arrayValue": {"values": [{"intValue": "1"}, {"stringValue": "a"}, {}]}}, '[1, "a", null]'),
        ({"arrayValue": {"values": [{"bytesValue": "AAE="}]}}, '["AAE="]'),
        (
            {"kvlistValue": {"values": [{"key": "a", "value": {"arrayValue": {"values": [{"boolValue": True}]}}}]}},
            '{"a": [true]}',
        ),
    ],
)
def test_values_keep_their_type_and_nested_ones_become_json(value: dict[str, Any], expected: object) -> None:
    (span,) = otlp.decode_json(value_request(value))
    assert span.attributes == {"key": expected}
    assert type(span.attributes["key"]) is type(expected)


def test_an_attribute_without_a_value_is_left_out() -> None:
    (span,) = otlp.decode_json(value_request({}))
    assert span.attributes == {}


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        '{"resourceSpans": 7}',
        '{"resourceSpans": [{"\\ud800": 1}]}',
        '{"resourceSpans": [7]}',
        '{"resourceSpans": [{"scopeSpans": [{"spans": ["x"]}]}]}',
        "[" * 100_000,
        b"\xff\xfe",
        json_request(traceId="xyz"),
        json_request(traceId=7),
        json_request(traceId="00"),
        json_request(traceId="0" * 32),
        json_request(spanId=""),
        json_request(spanId="0" * 16),
        json_request(parentSpanId="abcd"),
        json_request(name=7),
        json_request(name="\ud800"),
        json_request(startTimeUnixNano="-1"),
        json_request(startTimeUnixNano="18446744073709551615"),
        json_request(events=[{"name": "e", "timeUnixNano": "18446744073709551615"}]),
        json_request(attributes={"key": "value"}),
        value_request({"intValue": "9223372036854775808"}),
        value_request({"intValue": "one"}),
        value_request({"bytesValue": "A"}),
    ],
)
def test_malformed_json_is_an_otlp_error(body: str | bytes) -> None:
    with pytest.raises(OtlpError):
        otlp.decode_json(body)


def test_malformed_protobuf_is_an_otlp_error() -> None:
    with pytest.raises(OtlpError, match="3 bytes are not a protobuf"):
        otlp.decode(b"\x0a\xff\xff")
    with pytest.raises(OtlpError):
        otlp.decode(otlp.encode([FULL])[:-3])


def test_the_message_names_the_span_and_what_was_expected() -> None:
    request = ExportTraceServiceRequest()
    spans = request.resource_spans.add().scope_spans.add().spans
    spans.append(trace_pb2.Span(name="chat", trace_id=b"1234", span_id=b"12345678"))
    with pytest.raises(OtlpError, match="'chat' has the trace id '31323334', expected 16 bytes"):
        otlp.decode(request.SerializeToString())


@pytest.mark.parametrize("value", [2**63, object(), {"a": 1}, None, "\ud800", [object()]])
def test_a_value_that_otlp_cannot_represent_is_an_error_that_names_it(value: Any) -> None:
    with pytest.raises(OtlpError, match=r"span 'chat' .* cannot be written"):
        otlp.encode([Span(TRACE, SPAN, None, "chat", 1, 2, {"key": value})])
