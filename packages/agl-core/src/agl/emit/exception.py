"""`emit_exception`: an exception that the agent caught."""

from collections.abc import Mapping
from typing import Any

from agl import semconv
from agl.emit.record import record
from agl.errors import TelemetryError


def emit_exception(error: BaseException, *, attributes: Mapping[str, Any] | None = None) -> str | None:
    """Record an exception: status ERROR, `error.type`, and an `exception` event with message and stack trace.

    Example: `except TimeoutError as error: agl.emit_exception(error)`
    """
    return record(semconv.SPAN_EXCEPTION, lambda: exception_attributes(error), attributes, error)


def exception_attributes(error: BaseException) -> dict[str, str]:
    """Attributes of the span. Raises TelemetryError if `error` is not an exception."""
    if not isinstance(error, BaseException):
        raise TelemetryError(f"error is {type(error).__name__}, expected an exception")
    return {semconv.ERROR_TYPE: type(error).__qualname__}
