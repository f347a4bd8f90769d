"""A model call: its span from request to response, and the attributes of AutoGen's request and result."""

from collections.abc import Mapping, Sequence
from typing import Any

from autogen_core.models import ChatCompletionClient, CreateResult, LLMMessage
from opentelemetry.context import Context, create_key, get_value, set_value
from opentelemetry.trace import Span, set_span_in_context
from opentelemetry.util.types import AttributeValue

from agl import semconv
from agl.content.filter import ContentFilter
from agl.failsafe import never_raises
from agl_autogen._messages import finish_reason, input_messages, output_messages, tool_definitions
from agl_autogen._token_ids import TokenIdCapture

Attributes = dict[str, AttributeValue]

_CALL = create_key("agl-autogen-call")


class ChatCall:
    """A model call: its span, its token ids, and AutoGen's result once there is one."""

    def __init__(self, span: Span, content: ContentFilter) -> None:
        self.token_ids = TokenIdCapture()
        self.result: CreateResult | None = None
        self._span = span
        self._content = content

    @property
    def context(self) -> Context:
        """The OpenTelemetry context in which to make the request."""
        return set_value(_CALL, self, set_span_in_context(self._span))

    def describe_request(self, messages: Sequence[LLMMessage], options: Mapping[str, Any]) -> None:
        with never_raises("a model request is not on its span"):
            self._content.set_content(self._span, lambda: request_content(messages, options))

    def describe_response(self) -> None:
        with never_raises("a model answer is not on its span"):
            attributes = self.token_ids.attributes()
            try:
                if (result := self.result) is not None and self._span.is_recording():
                    attributes |= result_attributes(result)
                    attributes |= self._content.filtered(lambda: result_content(result), self._span)
            finally:  # in one call: each call costs more than each attribute
                self._span.set_attributes(attributes)


def current_call() -> ChatCall | None:
    """The call whose context is the current one."""
    call = get_value(_CALL)
    return call if isinstance(call, ChatCall) else None


def request_attributes(client: ChatCompletionClient, options: Mapping[str, Any], agent: str | None) -> Attributes:
    """Provider, model, sampling settings, and the agent that makes the call."""
    parameters = _parameters(client, options)
    temperature, max_tokens = parameters.get("temperature"), parameters.get("max_tokens")
    found: dict[str, AttributeValue | None] = {
        semconv.GEN_AI_OPERATION_NAME: semconv.OPERATION_CHAT,
        semconv.GEN_AI_PROVIDER_NAME: _provider(client),
        semconv.GEN_AI_REQUEST_MODEL: parameters.get("model"),
        semconv.GEN_AI_REQUEST_TEMPERATURE: None if temperature is None else float(temperature),
        semconv.GEN_AI_REQUEST_MAX_TOKENS: None if max_tokens is None else int(max_tokens),
        semconv.GEN_AI_AGENT_NAME: agent,
    }
    return {name: value for name, value in found.items() if value is not None}


def request_content(messages: Sequence[LLMMessage], options: Mapping[str, Any]) -> Attributes:
    """The messages, and the tools offered."""
    found: Attributes = {semconv.GEN_AI_INPUT_MESSAGES: input_messages(messages)}
    if tools := options.get("tools"):
        found[semconv.GEN_AI_TOOL_DEFINITIONS] = tool_definitions(tools)
    return found


def result_attributes(result: CreateResult) -> Attributes:
    """Finish reason, usage, and whether a cache answered."""
    found: Attributes = {semconv.GEN_AI_RESPONSE_FINISH_REASONS: [finish_reason(result)]}
    if result.cached:
        found[semconv.RESPONSE_CACHED] = True
    if result.usage.prompt_tokens or result.usage.completion_tokens:  # both are 0 for a stream without usage
        found[semconv.GEN_AI_USAGE_INPUT_TOKENS] = result.usage.prompt_tokens
        found[semconv.GEN_AI_USAGE_OUTPUT_TOKENS] = result.usage.completion_tokens
    return found


def result_content(result: CreateResult) -> Attributes:
    """The message of the model."""
    return {semconv.GEN_AI_OUTPUT_MESSAGES: output_messages(result)}


def _parameters(client: ChatCompletionClient, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Request parameters. The clients of autogen-ext keep theirs in `_create_args`."""
    return {**getattr(client, "_create_args", {}), **options.get("extra_create_args", {})}


def _provider(client: ChatCompletionClient) -> str | None:
    """Third part of the client's module: `openai` for `autogen_ext.models.openai` and classes derived from it."""
    modules = (cls.__module__.split(".") for cls in type(client).__mro__)
    return next((parts[2] for parts in modules if parts[:2] == ["autogen_ext", "models"]), None)
