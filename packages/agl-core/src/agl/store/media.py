"""Media of a rollout. Senders put the bytes on a span; the store keeps them in a span of their own, once each.

The ids of that span are those of the content: whoever sends the same bytes for the same rollout, in whichever call,
attempt or process, sends the same span, which the store keeps once. It is queried and deleted with its rollout.
"""

import hashlib
from collections.abc import Mapping
from typing import Final

from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

from agl import otlp, semconv
from agl.span import Span

MIN_BYTES: Final = 3072
"""Smaller media are not replaced by references (`agl.content.media`)."""
_TRACE_ID_BYTES: Final = 16
_SPAN_ID_BYTES: Final = 8


def media_of(span: trace_pb2.Span) -> dict[str, bytes]:
    """The media in the attributes of `span`, by their SHA-256."""
    if span.name == semconv.SPAN_MEDIA:
        return {}
    return {pair.key.removeprefix(semconv.MEDIA): pair.value.bytes_value for pair in span.attributes if _is_media(pair)}


def without_media(encoded: bytes) -> bytes:
    """The request with one span, without its media."""
    request = otlp.parse(encoded)
    for resource_spans in request.resource_spans:
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                kept = [pair for pair in span.attributes if not _is_media(pair)]
                del span.attributes[:]
                span.attributes.extend(kept)
    return request.SerializeToString()


def media_span(digest: str, data: bytes, rollout_id: str | None, trace_id: bytes, start_ns: int) -> Span:
    """The span with `data`: of the rollout if one is named, else of the trace."""
    trace, span = trace_id, bytes.fromhex(digest)[:_SPAN_ID_BYTES]
    if rollout_id is not None:
        key = hashlib.sha256(f"{digest} {rollout_id}".encode()).digest()
        trace, span = key[:_TRACE_ID_BYTES], key[_TRACE_ID_BYTES:][:_SPAN_ID_BYTES]
    attributes: Mapping[str, str | bytes] = {semconv.MEDIA + digest: data}
    if rollout_id is not None:
        attributes = {semconv.ROLLOUT_ID: rollout_id, **attributes}
    return Span(trace.hex(), span.hex(), None, semconv.SPAN_MEDIA, start_ns, start_ns, attributes)


def _is_media(pair: KeyValue) -> bool:
    digest = pair.key.removeprefix(semconv.MEDIA)
    return digest != pair.key and digest == hashlib.sha256(pair.value.bytes_value).hexdigest()
