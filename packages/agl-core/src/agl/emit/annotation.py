"""Facts about the rollout as plain span attributes."""

from collections.abc import Mapping
from typing import Any

from agl import semconv
from agl.emit.attributes import flat_attributes
from agl.emit.record import record
from agl.errors import TelemetryError
from agl.span import AttributeValue


def emit_annotation(values: Mapping[str, Any], *, attributes: Mapping[str, Any] | None = None) -> str | None:
    """Record `values` under their own names; nested mappings are joined by dots."""
    return record(semconv.SPAN_ANNOTATION, lambda: annotation_attributes(values), attributes)


def annotation_attributes(values: Mapping[str, Any]) -> dict[str, AttributeValue]:
    """Attributes of the span. Raises TelemetryError for no values, or one that is neither a scalar nor a list."""
    flat = flat_attributes(values)
    if not flat:
        raise TelemetryError("annotation is empty, expected at least one value")
    return flat
