"""A model call: the `chat` span that AutoGen lacks, around the call and fed from what passes inside it."""

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from autogen_core.models import ChatCompletionClient, CreateResult, LLMMessage
from opentelemetry.context import attach, detach
from opentelemetry.instrumentation.utils import is_instrumentation_enabled
from opentelemetry.trace import SpanKind

from agl import semconv
from agl.failsafe import never_raises
from agl_autogen._attributes import Attributes, request_attributes
from agl_autogen._call import Call, current_call
from agl_autogen._settings import Settings
from agl_autogen._span import mark_abandoned, open_span
from agl_autogen._stream import IsolatedStream
from agl_autogen._turn import current_agent

Create = Callable[..., Awaitable[CreateResult]]
CreateStream = Callable[..., AsyncGenerator[str | CreateResult, None]]


def traced_create(original: Create, settings: Settings) -> Create:
    """`create` of a model client under a `chat` span."""

    async def under_span(
        client: ChatCompletionClient, messages: Sequence[LLMMessage], *args: Any, **options: Any
    ) -> CreateResult:
        with _open_call(settings, client, messages, options) as call:
            token = attach(call.context)
            try:
                call.result = await original(client, messages, *args, **options)
            finally:
                detach(token)
            return call.shown(call.result)

    @functools.wraps(original)
    async def create(
        client: ChatCompletionClient, messages: Sequence[LLMMessage], *args: Any, **options: Any
    ) -> CreateResult:
        if _starts_a_call():
            return await under_span(client, messages, *args, **options)
        result = await original(client, messages, *args, **options)
        call = current_call()
        return call.shown(result) if call else result

    return create


def traced_create_stream(original: CreateStream, settings: Settings) -> CreateStream:
    """`create_stream` of a model client under a `chat` span, which ends with the stream however that ends."""

    async def under_span(
        client: ChatCompletionClient, messages: Sequence[LLMMessage], *args: Any, **options: Any
    ) -> AsyncGenerator[str | CreateResult, None]:
        with _open_call(settings, client, messages, options) as call:
            stream = original(client, messages, *args, **options)
            async with aclosing(IsolatedStream(stream, call.context)) as items:
                async for item in items:
                    call.result = item if isinstance(item, CreateResult) else None
                    yield item

    @functools.wraps(original)
    def create_stream(
        client: ChatCompletionClient, messages: Sequence[LLMMessage], *args: Any, **options: Any
    ) -> AsyncGenerator[str | CreateResult, None]:
        return (under_span if _starts_a_call() else original)(client, messages, *args, **options)

    return create_stream


def noting_event(original: Callable[..., None]) -> Callable[..., None]:
    """`LLMCallEvent.__init__`: clients make this event of every whole answer, whether or not it is then logged."""

    @functools.wraps(original)
    def init(event: Any, *, response: Mapping[str, Any], **fields: Any) -> None:
        if (call := current_call()) is not None:
            with never_raises("ids of a model answer are not on its span"):
                response = call.note_response(response)
        original(event, response=response, **fields)

    return init


def noting_chunks(original: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncGenerator[Any, None]]:
    """The generator of raw chunks under a client's stream: AutoGen's own items carry no ids."""

    @functools.wraps(original)
    async def chunks(*args: Any, **options: Any) -> AsyncGenerator[Any, None]:
        call = current_call()
        async with aclosing(original(*args, **options)) as stream:
            async for chunk in stream:
                if call is not None:
                    with never_raises("ids of a model answer are not on its span"):
                        call.note_chunk(chunk)
                yield chunk

    return chunks


def _starts_a_call() -> bool:
    """Whether this is a call of an agent. A client that asks another client, as a cache does, is still one call."""
    return is_instrumentation_enabled() and current_call() is None


@contextmanager
def _open_call(
    settings: Settings, client: ChatCompletionClient, messages: Sequence[LLMMessage], options: Mapping[str, Any]
) -> Iterator[Call]:
    attributes: Attributes = {}
    with never_raises("a model call is not described on its span"):
        attributes = request_attributes(client, options, current_agent())
    model = attributes.get(semconv.GEN_AI_REQUEST_MODEL)
    name = f"{semconv.OPERATION_CHAT} {model}" if model else semconv.OPERATION_CHAT
    with open_span(settings, name, SpanKind.CLIENT, attributes) as span:
        call = Call(span, settings.content)
        call.describe_request(messages, options)
        try:
            yield call
        except GeneratorExit:
            if call.result is None:
                mark_abandoned(span)
            raise
        finally:
            call.describe_answer()
