"""The message bus of a runtime: each message carries the context it was sent in; its spans carry no content."""

import functools
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from opentelemetry.context import Context, attach, create_key, detach, get_current, get_value, set_value
from opentelemetry.trace import Span

from agl.content import Content
from agl_autogen._span import marked_once

Process = Callable[..., Awaitable[None]]
TraceBlock = Callable[..., AbstractContextManager[Span]]

_SENT_IN = create_key("agl-autogen-sent-in")
_FIELD = "agl_sent_in"
_PAYLOAD = "message"


def sender_context() -> Context | None:
    """The OpenTelemetry context that the message was sent in whose delivery is under way here."""
    sent_in = get_value(_SENT_IN)
    return sent_in if isinstance(sent_in, Context) else None


def with_context(original: Callable[[], Any]) -> Callable[[], Any]:
    """`get_telemetry_envelope_metadata`, which a runtime calls in the sender's context for every message it queues."""

    @functools.wraps(original)
    def get_telemetry_envelope_metadata() -> Any:
        metadata = original()
        setattr(metadata, _FIELD, get_current())
        return metadata

    return get_telemetry_envelope_metadata


def delivering(original: Process) -> Process:
    """`_process_send` and `_process_publish`: the receiver finds the sender's context, which is not yet in force."""

    @functools.wraps(original)
    async def process(runtime: Any, message_envelope: Any) -> None:
        token = attach(set_value(_SENT_IN, getattr(message_envelope.metadata, _FIELD, None)))
        try:
            return await original(runtime, message_envelope)
        finally:
            detach(token)

    return process


def without_content(original: TraceBlock, content: Content) -> TraceBlock:
    """`TraceHelper.trace_block`, whose spans carry whole messages, and errors with all that they say.

    They stay as they are where all content may be on spans.
    """

    @contextmanager
    def silent_block(*args: Any, attributes: Mapping[str, Any] | None = None, **options: Any) -> Iterator[Span]:
        said = {name: value for name, value in (attributes or {}).items() if name != _PAYLOAD}
        with marked_once(original(*args, attributes=said, **options), content) as span:
            yield span

    @functools.wraps(original)
    def trace_block(*args: Any, **options: Any) -> AbstractContextManager[Span]:
        return (original if content.is_whole else silent_block)(*args, **options)

    return trace_block
