"""A model call: the `chat` span that AutoGen lacks, and what is put on the request and read from the answer."""

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from autogen_core.models import ChatCompletionClient, CreateResult, LLMMessage
from opentelemetry.context import Context, attach, create_key, detach, get_value, set_value
from opentelemetry.instrumentation.utils import is_instrumentation_enabled
from opentelemetry.trace import Span, SpanKind, set_span_in_context

import agl
from agl import semconv
from agl.boundary import never_raises
from agl_autogen._answer import Answer
from agl_autogen._attributes import (
    Attributes,
    request_attributes,
    request_content,
    result_attributes,
    result_content,
)
from agl_autogen._settings import Settings
from agl_autogen._span import mark_abandoned, open_span
from agl_autogen._stream import IsolatedStream
from agl_autogen._turn import current_agent

Create = Callable[..., Awaitable[CreateResult]]
CreateStream = Callable[..., AsyncGenerator[str | CreateResult, None]]

_CALL = create_key("agl-autogen-call")


class Call:
    """A model call under way: its span, and what is known of the answer."""

    def __init__(self, span: Span, captures_content: bool) -> None:
        self.answer = Answer()
        self.result: CreateResult | None = None
        self._span = span
        self._captures_content = captures_content

    @property
    def context(self) -> Context:
        """The OpenTelemetry context to make the request in."""
        return set_value(_CALL, self, set_span_in_context(self._span))

    def describe_request(self, messages: Sequence[LLMMessage], options: Mapping[str, Any]) -> None:
        with never_raises("a model request is not on its span"):
            if self._captures_content and self._span.is_recording():
                self._span.set_attributes(request_content(messages, options))

    def describe_answer(self) -> None:
        with never_raises("a model answer is not on its span"):
            if not self._span.is_recording():
                return
            self._span.set_attributes(self.answer.attributes())
            if self.result is not None:
                self._span.set_attributes(result_attributes(self.result))
                if self._captures_content:
                    self._span.set_attributes(result_content(self.result))


def traced_create(original: Create, settings: Settings) -> Create:
    """`create` of a model client under a `chat` span."""

    @functools.wraps(original)
    async def create(
        client: ChatCompletionClient, messages: Sequence[LLMMessage], *args: Any, **options: Any
    ) -> CreateResult:
        if not _starts_a_call():
            return await original(client, messages, *args, **options)
        with _open_call(settings, client, messages, options) as call:
            token = attach(call.context)
            try:
                call.result = await original(client, messages, *args, **options)
            finally:
                detach(token)
            return call.result

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
        original(event, response=response, **fields)
        call = _current_call()
        if call is not None:
            with never_raises("ids of a model answer are not on its span"):
                call.answer.note_response(response)

    return init


def noting_chunks(original: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncGenerator[Any, None]]:
    """The generator of raw chunks under a client's stream: AutoGen's own items carry no ids."""

    @functools.wraps(original)
    async def chunks(*args: Any, **options: Any) -> AsyncGenerator[Any, None]:
        call = _current_call()
        async with aclosing(original(*args, **options)) as stream:
            async for chunk in stream:
                if call is not None:
                    with never_raises("ids of a model answer are not on its span"):
                        call.answer.note_chunk(chunk)
                yield chunk

    return chunks


def with_headers(original: Callable[..., Any]) -> Callable[..., Any]:
    """`_process_create_args`, with `traceparent` and `baggage` among the request's headers.

    So a gateway hangs its own span under ours and knows rollout and role.
    """

    @functools.wraps(original)
    def process_create_args(*args: Any, **options: Any) -> Any:
        params = original(*args, **options)
        if _current_call() is not None:
            with never_raises("a model request carries no traceparent"):
                own = params.create_args.get("extra_headers") or {}
                params.create_args["extra_headers"] = {**own, **agl.headers()}
        return params

    return process_create_args


def _current_call() -> Call | None:
    call = get_value(_CALL)
    return call if isinstance(call, Call) else None


def _starts_a_call() -> bool:
    """Whether this is a call of an agent. A client that asks another client, as a cache does, is still one call."""
    return is_instrumentation_enabled() and _current_call() is None


@contextmanager
def _open_call(
    settings: Settings, client: ChatCompletionClient, messages: Sequence[LLMMessage], options: Mapping[str, Any]
) -> Iterator[Call]:
    attributes: Attributes = {}
    with never_raises("a model call is not described on its span"):
        attributes = request_attributes(client, options, current_agent())
    model = attributes.get(semconv.GEN_AI_REQUEST_MODEL)
    name = f"{semconv.OPERATION_CHAT} {model}" if model else semconv.OPERATION_CHAT
    with open_span(settings.tracer, name, SpanKind.CLIENT, attributes) as span:
        call = Call(span, settings.captures_content)
        call.describe_request(messages, options)
        try:
            yield call
        except GeneratorExit:
            if call.result is None:
                mark_abandoned(span)
            raise
        finally:
            call.describe_answer()
