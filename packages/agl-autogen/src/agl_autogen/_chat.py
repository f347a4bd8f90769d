"""Patches of model clients: a `chat` span around each call, trace headers on its request, and its token ids."""

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from autogen_core.models import ChatCompletionClient, CreateResult, LLMMessage
from opentelemetry.context import attach, detach
from opentelemetry.instrumentation.utils import is_instrumentation_enabled
from opentelemetry.trace import SpanKind

import agl
from agl import semconv
from agl.failsafe import never_raises
from agl_autogen._chat_call import Attributes, ChatCall, current_call, request_attributes
from agl_autogen._settings import Settings
from agl_autogen._span import mark_abandoned, open_span
from agl_autogen._stream import IsolatedStream
from agl_autogen._turn import current_agent

Messages = Sequence[LLMMessage]
Items = AsyncGenerator[str | CreateResult, None]
Create = Callable[..., Awaitable[CreateResult]]
CreateStream = Callable[..., Items]

_NO_IDS = "ids of a model answer are not on its span"


def traced_create(original: Create, settings: Settings) -> Create:
    """`create` of a model client in a `chat` span."""

    async def in_span(client: ChatCompletionClient, messages: Messages, *args: Any, **options: Any) -> CreateResult:
        with _open_call(settings, client, messages, options) as call:
            token = attach(call.context)
            try:
                call.result = await original(client, messages, *args, **options)
            finally:
                detach(token)
            return call.token_ids.hide(call.result)

    @functools.wraps(original)
    async def create(client: ChatCompletionClient, messages: Messages, *args: Any, **options: Any) -> CreateResult:
        if _starts_call():
            return await in_span(client, messages, *args, **options)
        result = await original(client, messages, *args, **options)
        call = current_call()
        return call.token_ids.hide(result) if call else result

    return create


def traced_create_stream(original: CreateStream, settings: Settings) -> CreateStream:
    """`create_stream` of a model client in a `chat` span, which ends when the stream ends, fails or is closed."""

    async def in_span(client: ChatCompletionClient, messages: Messages, *args: Any, **options: Any) -> Items:
        with _open_call(settings, client, messages, options) as call:
            async with aclosing(IsolatedStream(original(client, messages, *args, **options), call.context)) as items:
                async for item in items:
                    call.result = item if isinstance(item, CreateResult) else None
                    yield item

    @functools.wraps(original)
    def create_stream(client: ChatCompletionClient, messages: Messages, *args: Any, **options: Any) -> Items:
        return (in_span if _starts_call() else original)(client, messages, *args, **options)

    return create_stream


def with_headers(original: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    """`_process_create_args` of the OpenAI client: adds `traceparent` and `baggage` to the request's headers.

    With them a gateway's span is a child of ours with rollout and role. `capture_token_ids` requests ids and logprobs.
    """

    @functools.wraps(original)
    def process_create_args(*args: Any, **options: Any) -> Any:
        params = original(*args, **options)
        if (call := current_call()) is not None:
            with never_raises("a model request carries no traceparent"):
                own = params.create_args.get("extra_headers") or {}
                params.create_args["extra_headers"] = {**own, **agl.headers()}
                if settings.captures_token_ids:
                    call.token_ids.request(params.create_args)
        return params

    return process_create_args


def capturing_event(original: Callable[..., None]) -> Callable[..., None]:
    """`LLMCallEvent.__init__`: clients create this event for every whole response, whether or not it is logged."""

    @functools.wraps(original)
    def init(event: Any, *, response: Mapping[str, Any], **fields: Any) -> None:
        if (call := current_call()) is not None:
            with never_raises(_NO_IDS):
                response = call.token_ids.capture_response(response)
        original(event, response=response, **fields)

    return init


def capturing_chunks(original: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncGenerator[Any, None]]:
    """The generator of raw chunks in the OpenAI client's stream: the items that AutoGen makes of them have no ids."""

    @functools.wraps(original)
    async def chunks(*args: Any, **options: Any) -> AsyncGenerator[Any, None]:
        call = current_call()
        async with aclosing(original(*args, **options)) as stream:
            async for chunk in stream:
                if call is not None:
                    with never_raises(_NO_IDS):
                        call.token_ids.capture_chunk(chunk)
                yield chunk

    return chunks


def _starts_call() -> bool:
    """Whether an agent makes this call, and not a client (e.g. a cache) that forwards a call to another client."""
    return is_instrumentation_enabled() and current_call() is None


@contextmanager
def _open_call(
    settings: Settings, client: ChatCompletionClient, messages: Messages, options: Mapping[str, Any]
) -> Iterator[ChatCall]:
    attributes: Attributes = {}
    with never_raises("a model call is not described on its span"):
        attributes = request_attributes(client, options, current_agent())
    model = attributes.get(semconv.GEN_AI_REQUEST_MODEL)
    name = f"{semconv.OPERATION_CHAT} {model}" if model else semconv.OPERATION_CHAT
    with open_span(settings, name, SpanKind.CLIENT, attributes) as span:
        call = ChatCall(span, settings.content)
        call.describe_request(messages, options)
        try:
            yield call
        except GeneratorExit:
            if call.result is None:
                mark_abandoned(span)
            raise
        finally:
            call.describe_response()
