"""`emit_annotation`: facts about the rollout as span attributes."""

from collections.abc import Mapping
from typing import Any

from agl import semconv
from agl.emit.attributes import flat_attributes
from agl.emit.record import record
from agl.errors import TelemetryError
from agl.span import AttributeValue


def emit_annotation(values: Mapping[str, Any], *, attributes: Mapping[str, Any] | None = None) -> str | None:
    """Record `values` as span attributes under their own names; keys of nested mappings are joined by dots.

    Example: `agl.emit_annotation({"task": {"difficulty": 3, "tags": ["sql", "join"]}})`
    """
    return record(semconv.SPAN_ANNOTATION, lambda: annotation_attributes(values), attributes)


def annotation_attributes(values: Mapping[str, Any]) -> dict[str, AttributeValue]:
    """Attributes of the span. Raises TelemetryError if `values` is empty or has a value that a span cannot hold."""
    flat = flat_attributes(values)
    if not flat:
        raise TelemetryError("annotation is empty, expected at least one value")
    return flat
