"""Patches of a runtime's message bus: each message carries its sender's context, in which its receiver takes a turn.

A runtime handles messages in the context in which it was started: outside of any rollout, or in that of another run.
"""

import functools
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from opentelemetry.context import Context, attach, detach, get_current
from opentelemetry.instrumentation.utils import is_instrumentation_enabled
from opentelemetry.trace import INVALID_SPAN, NoOpTracer, Span

import agl
from agl.failsafe import never_raises
from agl.propagation import joined_context
from agl_autogen._settings import Settings
from agl_autogen._span import with_error_marked
from agl_autogen._turn import open_turn

TraceBlock = Callable[..., AbstractContextManager[Span]]
OnMessage = Callable[..., Awaitable[Any]]
SendMessage = Callable[..., Awaitable[None]]

_SENDER_CONTEXT: ContextVar[Context | None] = ContextVar("agl-autogen-sender-context", default=None)
"""OpenTelemetry context of the sender of the message that is being delivered."""
_FIELD = "agl_sender_context"
_HEADERS = {"traceparent", "baggage"}
_PAYLOAD = "message"


def with_sender_context(original: Callable[[], Any]) -> Callable[[], Any]:
    """`get_telemetry_envelope_metadata`, which a runtime calls in the sender's context for every message it queues."""

    @functools.wraps(original)
    def get_telemetry_envelope_metadata() -> Any:
        metadata = original()
        setattr(metadata, _FIELD, get_current())
        return metadata

    return get_telemetry_envelope_metadata


def with_sender_headers(original: SendMessage) -> SendMessage:
    """`_send_message` of the gRPC runtime, called in the sender's context: adds rollout, role and span to the message.

    Requests have a field for metadata; events carry them as attributes, beside those of AutoGen.
    """

    @functools.wraps(original)
    def send_message(runtime: Any, message: Any, *args: Any, **options: Any) -> Awaitable[None]:
        with never_raises("a message carries no rollout"):
            for name, value in agl.headers().items():
                if message.HasField("cloudEvent"):
                    message.cloudEvent.attributes[name].ce_string = value
                elif message.HasField("request"):
                    message.request.metadata[name] = value
        return original(runtime, message, *args, **options)

    return send_message


def traced_delivery(original: TraceBlock, settings: Settings) -> TraceBlock:
    """`TraceHelper.trace_block`, which a runtime opens around the delivery of a message with its metadata as `parent`.

    Hands the sender's context to the receiver (`handled_as_turn`) without attaching it: a runtime handles each message
    in a task of its own. The block's spans are far more numerous than all others, so they are made only by request.
    They carry whole messages and errors, so they stay unchanged only if all content is recorded.
    """
    content = settings.content

    @contextmanager
    def without_content(*args: Any, attributes: Mapping[str, Any] | None = None, **options: Any) -> Iterator[Span]:
        facts = {name: value for name, value in (attributes or {}).items() if name != _PAYLOAD}
        with with_error_marked(original(*args, attributes=facts, **options), content) as span:
            yield span

    @functools.wraps(original)
    def trace_block(
        helper: Any, operation: Any, destination: Any, parent: Any, **options: Any
    ) -> AbstractContextManager[Span]:
        if parent is not None:
            _SENDER_CONTEXT.set(_sender_context(parent))
        if not settings.records_message_bus or isinstance(helper.tracer, NoOpTracer):
            return nullcontext(INVALID_SPAN)
        block = original if content.records_everything else without_content
        return block(helper, operation, destination, parent, **options)

    return trace_block


def handled_as_turn(original: OnMessage, settings: Settings) -> OnMessage:
    """`on_message` of a core agent: a turn in the context in which the message was sent."""

    @functools.wraps(original)
    async def on_message(agent: Any, *args: Any, **options: Any) -> Any:
        context = _SENDER_CONTEXT.get()
        with ExitStack() as turn:
            if context is not None:
                turn.callback(detach, attach(context))
            if is_instrumentation_enabled():
                described = {"agent_id": str(agent.id), "agent_description": agent.metadata["description"]}
                turn.enter_context(open_turn(settings, agent.id.type, **described))
            return await original(agent, *args, **options)

    return on_message


def _sender_context(metadata: Any) -> Context | None:
    """From a message's metadata: an object of AutoGen's in this process, or a mapping received from another one."""
    if isinstance(metadata, Mapping) and not _HEADERS.isdisjoint(metadata):
        return joined_context(metadata)
    return getattr(metadata, _FIELD, None)
