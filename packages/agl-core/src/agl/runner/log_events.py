"""Logs of an agent as events of its rollout's span."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from opentelemetry import trace

from agl import semconv
from agl.emit.record import EMITTED_CONTENT

_span: ContextVar[trace.Span | None] = ContextVar("agl_log_span", default=None)


@contextmanager
def logs_recorded() -> Iterator[None]:
    """Record what the block logs, in its threads and tasks too, as events of the span that is current now.

    A span keeps its last 128 events (`OTEL_SPAN_EVENT_COUNT_LIMIT`).
    """
    handlers = logging.getLogger().handlers
    if not any(isinstance(handler, _EventHandler) for handler in handlers):
        logging.getLogger().addHandler(_EventHandler())
    token = _span.set(trace.get_current_span())
    try:
        yield
    finally:
        _span.reset(token)


def record_line(source: str, severity: str, text: str) -> None:
    """Record one line of `source` (a logger's name, or `stdout` and `stderr`) of the rollout that is current."""
    span = _span.get()
    if span is None:
        return
    token = _span.set(None)  # Redaction may log.
    try:
        event = {semconv.LOG_SOURCE: source, semconv.LOG_SEVERITY: severity, semconv.LOG_BODY: text}
        span.add_event(semconv.EVENT_LOG, EMITTED_CONTENT.redacted(event))
    finally:
        _span.reset(token)


class _EventHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            record_line(record.name, record.levelname.lower(), self.format(record))
        except Exception:  # noqa: BLE001 - as every handler of `logging`
            self.handleError(record)
