"""`emit_message`: a line of text, such as a log line that belongs to the rollout."""

from collections.abc import Mapping
from typing import Any

from agl import semconv
from agl.emit.record import record
from agl.errors import TelemetryError


def emit_message(body: str, *, attributes: Mapping[str, Any] | None = None) -> str | None:
    """Record a line of text. Example: `agl.emit_message("retrying with a longer timeout")`"""
    return record(semconv.SPAN_MESSAGE, lambda: message_attributes(body), attributes)


def message_attributes(body: str) -> dict[str, str]:
    """Attributes of the span. Raises TelemetryError if `body` is not a str."""
    if not isinstance(body, str):
        raise TelemetryError(f"message is {type(body).__name__}, expected str; emit_object keeps any JSON value")
    return {semconv.MESSAGE_BODY: body}
