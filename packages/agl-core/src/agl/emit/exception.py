"""An exception that the agent caught and lives on with."""

from collections.abc import Mapping
from typing import Any

from agl import semconv
from agl.emit.record import record
from agl.errors import TelemetryError


def emit_exception(error: BaseException, *, attributes: Mapping[str, Any] | None = None) -> str | None:
    """Record an exception: status error, `error.type`, and an `exception` event with message and stack trace."""
    return record(semconv.SPAN_EXCEPTION, lambda: exception_attributes(error), attributes, error)


def exception_attributes(error: BaseException) -> dict[str, str]:
    """Attributes of the span. Raises TelemetryError where `error` is not an exception."""
    if not isinstance(error, BaseException):
        raise TelemetryError(f"error is {type(error).__name__}, expected an exception")
    return {semconv.ERROR_TYPE: type(error).__qualname__}
