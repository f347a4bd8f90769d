"""Requests parsed into rows: the same spans and columns as from decoded spans."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans

from agl import otlp, semconv
from agl.errors import OtlpError
from agl.span import Span
from agl.store import span_row
from agl.store.span_row import SpanRow
from tests.core.span_maker import span
from tests.core.whole_request import whole_request

NAMES = st.sampled_from(["chat", semconv.SPAN_GATEWAY_CALL])
ATTRIBUTES = st.dictionaries(
    st.sampled_from([semconv.ROLLOUT_ID, semconv.GEN_AI_RESPONSE_ID, "agentlightning.rollout_id", "output.value", "x"]),
    st.one_of(st.text(max_size=300), st.integers(-(2**63), 2**63 - 1), st.binary(max_size=300)),
)
RESOURCES = st.sampled_from([{}, {"service.name": "a"}, {"agentlightning.rollout_id": "r-of-resource"}])


def random_span(name: str, attributes: dict, resource: dict, scope: str) -> Span:
    return replace(span(name), attributes=attributes, resource=resource, scope=scope)


SPANS = st.lists(st.builds(random_span, NAMES, ATTRIBUTES, RESOURCES, st.sampled_from(["", "scope"])), max_size=6)


@given(SPANS)
def test_rows_of_a_request_are_the_rows_of_its_spans(spans: list[Span]) -> None:
    parsed = span_row.parse(otlp.encode(spans))
    assert [replace(found, otlp=b"") for found in parsed.rows] == [replace(SpanRow.of(one), otlp=b"") for one in spans]
    assert [otlp.decode(found.otlp) for found in parsed.rows] == [[one] for one in spans]
    assert span_row.parse_json(otlp.encode_json(spans)) == parsed


def test_an_openinference_span_gets_the_response_id_from_its_output() -> None:
    attributes = {"openinference.span.kind": "LLM", "output.value": '{"id": "chatcmpl-1"}'}
    (found,) = span_row.parse(otlp.encode([span("ChatOpenAI", attributes)])).rows
    assert (found.asked, found.answered) == ("chatcmpl-1", None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"span_id": "00" * 8}, "span id"),
        ({"trace_id": "ab"}, "trace id"),
        ({"parent_id": "abcd"}, "parent id"),
        ({"end_ns": 2**63}, "time"),
    ],
)
def test_invalid_spans_are_rejected_and_the_others_parsed(change: dict, reason: str) -> None:
    good = span("good")
    parsed = span_row.parse(otlp.encode([replace(span("bad"), **change), good]))
    assert [found.span_id.hex() for found in parsed.rows] == [good.span_id]
    assert parsed.rejected == 1 and reason in parsed.reason


def test_a_body_that_is_not_protobuf_is_an_otlp_error() -> None:
    with pytest.raises(OtlpError, match="9 bytes are not"):
        span_row.parse(b"garbage!!")


@given(SPANS, st.integers(1, 2000), st.binary(max_size=3))
def test_a_large_request_is_parsed_in_chunks_with_the_same_rows(spans: list[Span], size: int, after: bytes) -> None:
    """Trailing bytes that are invalid raise the same error as without chunks."""
    body = otlp.encode(spans) + after
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(span_row, "CHUNK_BYTES", 2**30)
        try:
            whole = span_row.parse(body)
        except OtlpError:
            whole = None
        patch.setattr(span_row, "CHUNK_BYTES", size)
        if whole is None:
            with pytest.raises(OtlpError):
                span_row.parse(body)
        else:
            assert span_row.parse(body) == whole


def test_chunks_are_within_their_size() -> None:
    body = otlp.encode([span(f"{number}", {"text": "x" * 1_000}) for number in range(5_000)])
    pieces = list(span_row.split(body))
    assert len(pieces) <= len(body) // span_row.CHUNK_BYTES + 2
    assert max(len(piece) for piece, _ in pieces) <= span_row.CHUNK_BYTES
    assert otlp.decode(b"".join(piece for piece, _ in pieces)) == otlp.decode(body)
    assert [one for _, alone in pieces for request in alone for one in otlp.decode(request)] == otlp.decode(body)


def test_a_row_has_every_field_of_the_span() -> None:
    request = whole_request()
    (found,) = span_row.parse(request.SerializeToString()).rows
    assert ExportTraceServiceRequest.FromString(found.otlp) == request


def test_the_copies_of_a_long_resource_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_row, "MAX_TOTAL_BYTES", 10**6)
    spans = [replace(span("chat"), resource={"text": "x" * 10_000}) for _ in range(200)]
    assert len(span_row.parse(otlp.encode(spans[:90])).rows) == 90
    body = otlp.encode(spans)
    assert len(body) < 50_000
    with pytest.raises(OtlpError, match=f"the spans of {len(body)} bytes take over 10.* send fewer"):
        span_row.parse(body)


@pytest.mark.parametrize("odd", [b"\x08\x01", b"\xc2\x3e\x02\x08\x01", b"\x0d1234"])
def test_unknown_fields_are_ignored(odd: bytes) -> None:
    """Fields of a later OTLP version, for example: numbers and messages in each message that contains spans."""
    plain = otlp.encode([span("chat")])
    expected = span_row.parse(plain)
    assert span_row.parse(odd + plain + odd) == expected
    resource_spans = ExportTraceServiceRequest.FromString(plain).resource_spans[0]
    resource_spans.MergeFromString(odd)
    resource_spans.scope_spans[0].MergeFromString(odd)
    assert span_row.parse(ExportTraceServiceRequest(resource_spans=[resource_spans]).SerializeToString()) == expected


def test_a_resource_in_several_fields_is_merged() -> None:
    """Protobuf merges a message field that occurs twice."""
    plain = otlp.encode([replace(span("chat"), attributes={})])
    inner = ExportTraceServiceRequest.FromString(plain).resource_spans[0].SerializeToString()
    parts = resource_field("agentlightning.rollout_id", "r") + inner + resource_field("service.name", "s")
    (found,) = span_row.parse(b"\x0a" + bytes((len(parts) & 0x7F | 0x80, len(parts) >> 7)) + parts).rows
    assert found.rollout_id == "r"
    (one,) = otlp.decode(found.otlp)
    assert one.resource == {"agentlightning.rollout_id": "r", "service.name": "s"}


def resource_field(key: str, value: str) -> bytes:
    """A ResourceSpans with only this resource attribute."""
    attribute = KeyValue(key=key, value=AnyValue(string_value=value))
    return ResourceSpans(resource=Resource(attributes=[attribute])).SerializeToString()
