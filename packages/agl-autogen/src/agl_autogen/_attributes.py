"""Span attributes of a model call: of its request, and of AutoGen's result."""

from collections.abc import Mapping, Sequence
from typing import Any

from autogen_core.models import ChatCompletionClient, CreateResult, LLMMessage
from opentelemetry.util.types import AttributeValue

from agl import semconv
from agl_autogen._messages import finish_reason, input_messages, output_messages, tool_definitions

Attributes = dict[str, AttributeValue]


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
    """Finish reason and usage."""
    found: Attributes = {semconv.GEN_AI_RESPONSE_FINISH_REASONS: [finish_reason(result)]}
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
