"""A free-text message, e.g. a line of log that belongs to the rollout."""

from collections.abc import Mapping
from typing import Any

from agl import semconv
from agl.emit.record import record
from agl.errors import TelemetryError


def emit_message(body: str, *, attributes: Mapping[str, Any] | None = None) -> str | None:
    """Record a line of text."""
    return record(semconv.SPAN_MESSAGE, lambda: message_attributes(body), attributes)


def message_attributes(body: str) -> dict[str, str]:
    """Attributes of the span. Raises TelemetryError where `body` is not text."""
    if not isinstance(body, str):
        raise TelemetryError(f"message is {type(body).__name__}, expected str; emit_object keeps any JSON value")
    return {semconv.MESSAGE_BODY: body}
