"""`record`: the span of every emitter."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from opentelemetry import trace

from agl.content.filter import ContentFilter
from agl.context import TRACER, current_rollout
from agl.emit.attributes import flat_attributes
from agl.failsafe import raises_if_strict
from agl.span import now_ns

logger = logging.getLogger(__name__)

EMITTED_CONTENT = ContentFilter()
"""Captured whatever the environment variable is, because the agent asks for it explicitly."""


def record(
    name: str,
    build: Callable[[], Mapping[str, Any]],
    attributes: Mapping[str, Any] | None,
    error: BaseException | None = None,
) -> str | None:
    """Record a span `name` of no duration and return its id. Attributes of `build` override `attributes`.

    An exception of `build` is logged with the rollout's id and None is returned; with `AGL_STRICT=1` it propagates.
    `error`, if given, is recorded on the span.
    """
    active = current_rollout()
    with raises_if_strict(f"{name} was not recorded ({f'rollout {active.rollout_id}' if active else 'no rollout'})"):
        own = flat_attributes(attributes or {}) | flat_attributes(build())
        span = TRACER.start_span(name, attributes=EMITTED_CONTENT.redacted(own), start_time=now_ns())
        if not span.is_recording():
            _warn_if_not_initialized()
            return None
        if error is not None:
            EMITTED_CONTENT.mark_error(span, error)
        span.end(now_ns())
        return trace.format_span_id(span.get_span_context().span_id)
    return None


@functools.cache
def _warn_if_not_initialized() -> None:
    """Warn once per process if `agl.init()` was not called. A trace that is not sampled causes no warning."""
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        logger.warning("nothing is recorded: agl.init() was not called in this process")
