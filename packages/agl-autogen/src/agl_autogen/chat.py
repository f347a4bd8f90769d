"""A model call: the `chat` span that AutoGen lacks, and what is put on the request and read from the answer."""

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from autogen_core.models import ChatCompletionClient, CreateResult, LLMMessage
from opentelemetry.context import Context, attach, create_key, detach, get_value, set_value
from opentelemetry.instrumentation.utils import is_instrumentation_enabled
from opentelemetry.trace import Span, SpanKind, Tracer, set_span_in_context
from opentelemetry.util.types import AttributeValue

import agl
from agl import semconv
from agl.boundary import never_raises
from agl_autogen.answer import Answer
from agl_autogen.messages import finish_reason, input_messages, output_messages, tool_definitions
from agl_autogen.span import open_span
from agl_autogen.stream import IsolatedStream
from agl_autogen.turn import current_agent

Create = Callable[..., Awaitable[CreateResult]]
CreateStream = Callable[..., AsyncGenerator[str | CreateResult, None]]

_CALL = create_key("agl-autogen-call")


class Call:
    """A model call under way: its span, and what is known of the answer."""

    def __init__(self, span: Span) -> None:
        self.answer = Answer()
        self.result: CreateResult | None = None
        self._span = span

    @property
    def context(self) -> Context:
        """The OpenTelemetry context to make the request in."""
        return set_value(_CALL, self, set_span_in_context(self._span))

    def describe_request(
        self, client: ChatCompletionClient, messages: Sequence[LLMMessage], options: Mapping[str, Any]
    ) -> None:
        with never_raises("a model request is not on its span"):
            if self._span.is_recording():
                self._span.set_attributes(_request_attributes(client, messages, options))

    def describe_answer(self) -> None:
        with never_raises("a model answer is not on its span"):
            if self._span.is_recording():
                self._span.set_attributes(self.answer.attributes() | _result_attributes(self.result))


def traced_create(original: Create, tracer: Tracer) -> Create:
    """`create` of a model client under a `chat` span."""

    @functools.wraps(original)
    async def create(
        client: ChatCompletionClient, messages: Sequence[LLMMessage], *args: Any, **options: Any
    ) -> CreateResult:
        if not _starts_a_call():
            return await original(client, messages, *args, **options)
        with _open_call(tracer, client, messages, options) as call:
            token = attach(call.context)
            try:
                call.result = await original(client, messages, *args, **options)
            finally:
                detach(token)
            return call.result

    return create


def traced_create_stream(original: CreateStream, tracer: Tracer) -> CreateStream:
    """`create_stream` of a model client under a `chat` span, which ends with the stream however that ends."""

    async def under_span(
        client: ChatCompletionClient, messages: Sequence[LLMMessage], *args: Any, **options: Any
    ) -> AsyncGenerator[str | CreateResult, None]:
        with _open_call(tracer, client, messages, options) as call:
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
    tracer: Tracer, client: ChatCompletionClient, messages: Sequence[LLMMessage], options: Mapping[str, Any]
) -> Iterator[Call]:
    attributes = _head_attributes(client, options)
    model = attributes.get(semconv.GEN_AI_REQUEST_MODEL)
    name = f"{semconv.OPERATION_CHAT} {model}" if model else semconv.OPERATION_CHAT
    with open_span(tracer, name, SpanKind.CLIENT, attributes) as span:
        call = Call(span)
        call.describe_request(client, messages, options)
        try:
            yield call
        finally:
            call.describe_answer()


def _head_attributes(client: ChatCompletionClient, options: Mapping[str, Any]) -> dict[str, AttributeValue]:
    """What a sampler may want to see when the span starts."""
    found: dict[str, AttributeValue | None] = {semconv.GEN_AI_OPERATION_NAME: semconv.OPERATION_CHAT}
    with never_raises("model and agent are not on the span of a model call"):
        found |= {
            semconv.GEN_AI_PROVIDER_NAME: _provider(client),
            semconv.GEN_AI_REQUEST_MODEL: _parameters(client, options).get("model"),
            semconv.GEN_AI_AGENT_NAME: current_agent(),
        }
    return {name: value for name, value in found.items() if value is not None}


def _request_attributes(
    client: ChatCompletionClient, messages: Sequence[LLMMessage], options: Mapping[str, Any]
) -> dict[str, AttributeValue]:
    parameters = _parameters(client, options)
    found: dict[str, AttributeValue] = {semconv.GEN_AI_INPUT_MESSAGES: input_messages(messages)}
    if tools := options.get("tools"):
        found[semconv.GEN_AI_TOOL_DEFINITIONS] = tool_definitions(tools)
    if parameters.get("temperature") is not None:
        found[semconv.GEN_AI_REQUEST_TEMPERATURE] = float(parameters["temperature"])
    if parameters.get("max_tokens") is not None:
        found[semconv.GEN_AI_REQUEST_MAX_TOKENS] = int(parameters["max_tokens"])
    return found


def _result_attributes(result: CreateResult | None) -> dict[str, AttributeValue]:
    if result is None:
        return {}
    found: dict[str, AttributeValue] = {
        semconv.GEN_AI_OUTPUT_MESSAGES: output_messages(result),
        semconv.GEN_AI_RESPONSE_FINISH_REASONS: [finish_reason(result)],
    }
    if result.usage.prompt_tokens or result.usage.completion_tokens:  # a stream without usage says 0 and 0
        found[semconv.GEN_AI_USAGE_INPUT_TOKENS] = result.usage.prompt_tokens
        found[semconv.GEN_AI_USAGE_OUTPUT_TOKENS] = result.usage.completion_tokens
    return found


def _parameters(client: ChatCompletionClient, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Request parameters: every client of autogen-ext that has some keeps them in `_create_args`."""
    return {**getattr(client, "_create_args", {}), **options.get("extra_create_args", {})}


def _provider(client: ChatCompletionClient) -> str | None:
    """`openai` of `autogen_ext.models.openai`, for its subclasses too."""
    modules = (cls.__module__.split(".") for cls in type(client).__mro__)
    return next((parts[2] for parts in modules if parts[:2] == ["autogen_ext", "models"]), None)
