"""`emit_observation`: something that an agent observed."""

from collections.abc import Mapping
from typing import Any

from agl import semconv
from agl.emit.attributes import json_text, role_attribute
from agl.emit.record import record


def emit_observation(
    content: Any, *, role: str | None = None, attributes: Mapping[str, Any] | None = None
) -> str | None:
    """Record text or any JSON value that an agent observed. `role`: that agent's role (default: the current role).

    Example: `agl.emit_observation("the shelf is empty", role="planner")`
    """
    return record(semconv.SPAN_OBSERVATION, lambda: observation_attributes(content, role=role), attributes)


def observation_attributes(content: Any, *, role: str | None = None) -> dict[str, Any]:
    """Attributes of the span; content other than text becomes JSON."""
    text = content if isinstance(content, str) else json_text("observation", content)
    return {semconv.OBSERVATION_CONTENT: text} | role_attribute(role)
