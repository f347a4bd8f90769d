"""The message bus of a runtime: each message carries the context it was sent in; its spans carry no content."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from opentelemetry.context import Context, get_current
from opentelemetry.trace import INVALID_SPAN, NoOpTracer, Span

from agl.content.filter import ContentFilter
from agl_autogen._span import marked_once

TraceBlock = Callable[..., AbstractContextManager[Span]]

_SENT_IN: ContextVar[Context | None] = ContextVar("agl-autogen-sent-in", default=None)
_FIELD = "agl_sent_in"
_PAYLOAD = "message"


def sender_context() -> Context | None:
    """The OpenTelemetry context that the message was sent in whose delivery is under way here."""
    return _SENT_IN.get()


def with_context(original: Callable[[], Any]) -> Callable[[], Any]:
    """`get_telemetry_envelope_metadata`, which a runtime calls in the sender's context for every message it queues."""

    @functools.wraps(original)
    def get_telemetry_envelope_metadata() -> Any:
        metadata = original()
        setattr(metadata, _FIELD, get_current())
        return metadata

    return get_telemetry_envelope_metadata


def delivering(original: TraceBlock, content: ContentFilter) -> TraceBlock:
    """`TraceHelper.trace_block`, which a runtime opens around the delivery of a message, with its metadata as parent.

    The receiver finds the sender's context there, which is not yet in force: the runtime gives every message a task of
    its own. The block's spans carry whole messages, and errors with all that they say: they stay as they are only where
    all content may be on spans. Where the user has silenced them, they are not made only to be thrown away.
    """

    @contextmanager
    def silent_block(*args: Any, attributes: Mapping[str, Any] | None = None, **options: Any) -> Iterator[Span]:
        said = {name: value for name, value in (attributes or {}).items() if name != _PAYLOAD}
        with marked_once(original(*args, attributes=said, **options), content) as span:
            yield span

    @functools.wraps(original)
    def trace_block(
        helper: Any, operation: Any, destination: Any, parent: Any, **options: Any
    ) -> AbstractContextManager[Span]:
        if parent is not None:
            _SENT_IN.set(getattr(parent, _FIELD, None))
        if isinstance(helper.tracer, NoOpTracer):
            return nullcontext(INVALID_SPAN)
        return (original if content.records_everything else silent_block)(
            helper, operation, destination, parent, **options
        )

    return trace_block
