"""How every emitter records its span."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from opentelemetry import trace

from agl.content.content import Content
from agl.context import TRACER, current_rollout, mark_error
from agl.emit.attributes import flat_attributes
from agl.failsafe import raises_if_strict

logger = logging.getLogger(__name__)

_CONTENT = Content()
"""Captured, whatever the environment says: the caller asked for it."""


def record(
    name: str,
    build: Callable[[], Mapping[str, Any]],
    attributes: Mapping[str, Any] | None,
    error: BaseException | None = None,
) -> str | None:
    """Record a span `name` of no duration with what `build` returns over `attributes`, and return its id.

    What `build` raises is logged with the rollout, and None is returned; with `AGL_STRICT=1` it is raised. `error` is
    marked on the span.
    """
    active = current_rollout()
    with raises_if_strict(f"{name} was not recorded ({f'rollout {active.rollout_id}' if active else 'no rollout'})"):
        said = flat_attributes(attributes or {}) | flat_attributes(build())
        span = TRACER.start_span(name, attributes=_CONTENT.redacted(said))
        if not span.is_recording():
            _explain_silence()
            return None
        if error is not None:
            mark_error(span, error, _CONTENT)
        span.end()
        return trace.format_span_id(span.get_span_context().span_id)
    return None


@functools.cache
def _explain_silence() -> None:
    """Say once in a process that emitters record nothing before `agl.init()`; a sampled-out trace is not worth it."""
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        logger.warning("nothing is recorded: agl.init() was not called in this process")
