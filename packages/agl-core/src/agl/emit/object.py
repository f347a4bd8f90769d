"""`emit_object`: a JSON value or bytes."""

from collections.abc import Mapping
from typing import Any

from agl import semconv
from agl.emit.attributes import json_text
from agl.emit.record import record


def emit_object(value: Any, *, attributes: Mapping[str, Any] | None = None) -> str | None:
    """Record any JSON value, or bytes. Example: `agl.emit_object({"query": sql, "rows": rows})`"""
    return record(semconv.SPAN_OBJECT, lambda: object_attributes(value), attributes)


def object_attributes(value: Any) -> dict[str, str | bytes]:
    """Attributes of the span. With `AGL_STRICT=1`, raises TelemetryError if `value` is neither bytes nor JSON."""
    if isinstance(value, bytes | bytearray | memoryview):
        return {semconv.OBJECT_TYPE: "bytes", semconv.OBJECT_BYTES: bytes(value)}
    return {semconv.OBJECT_TYPE: "json", semconv.OBJECT_JSON: json_text("object", value)}
