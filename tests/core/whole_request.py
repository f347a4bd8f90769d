"""An OTLP request in which every field is set."""

from collections.abc import MutableSequence

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue

_OF_TYPE = {
    FieldDescriptor.TYPE_BYTES: b"\x01\xff",
    FieldDescriptor.TYPE_STRING: "naïve",
    FieldDescriptor.TYPE_ENUM: 2,
    FieldDescriptor.TYPE_INT32: 4,
    FieldDescriptor.TYPE_UINT32: 3,
    FieldDescriptor.TYPE_FIXED32: 257,
    FieldDescriptor.TYPE_FIXED64: 1_795_000_000_000_000_001,
}
_OF_NAME = {"trace_id": bytes(range(16)), "span_id": bytes(range(1, 9)), "parent_span_id": bytes(range(2, 10))}


def whole_request() -> ExportTraceServiceRequest:
    """One of a single span."""
    request = ExportTraceServiceRequest()
    _fill(request)
    return request


def _fill(message: Message) -> None:
    if isinstance(message, AnyValue):
        message.string_value = "a value"
        return
    for field in message.DESCRIPTOR.fields:
        inner = getattr(message, field.name)
        is_list = isinstance(inner, MutableSequence)
        if field.message_type is not None:
            _fill(inner.add() if is_list else inner)
            continue
        value = _OF_NAME.get(field.name, _OF_TYPE[field.type])
        if is_list:
            inner.append(value)
        else:
            setattr(message, field.name, value)
