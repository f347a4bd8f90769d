"""What a model call says of itself: the attributes of its request and of its answer."""

from collections.abc import Mapping
from typing import Any

from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, Generation, LLMResult
from opentelemetry.util.types import AttributeValue

from agl import semconv
from agl_langchain._messages import finish_reason, output_messages, to_json

Attributes = dict[str, AttributeValue]


def request_attributes(parameters: Mapping[str, Any], metadata: Mapping[str, Any]) -> Attributes:
    """Model, provider and sampling settings, from the call's parameters and LangChain's notes on the model."""
    found: Attributes = {}
    if model := parameters.get("model") or parameters.get("model_name") or metadata.get("ls_model_name"):
        found[semconv.GEN_AI_REQUEST_MODEL] = str(model)
    if provider := metadata.get("ls_provider"):
        found[semconv.GEN_AI_PROVIDER_NAME] = str(provider)
    temperature = parameters.get("temperature", metadata.get("ls_temperature"))
    if isinstance(temperature, int | float):
        found[semconv.GEN_AI_REQUEST_TEMPERATURE] = float(temperature)
    max_tokens = parameters.get("max_completion_tokens") or parameters.get("max_tokens")
    if isinstance(max_tokens, int):
        found[semconv.GEN_AI_REQUEST_MAX_TOKENS] = max_tokens
    return found


def tool_definitions(parameters: Mapping[str, Any]) -> Attributes:
    """The tools offered to the model, as its client is given them."""
    tools = parameters.get("tools")
    return {semconv.GEN_AI_TOOL_DEFINITIONS: to_json(tools)} if tools else {}


def response_attributes(result: LLMResult) -> Attributes:
    """Model, id, usage and finish reasons of the answer, as far as it says.

    A streamed answer of `ChatOpenAI` has no id here: LangChain drops it.
    """
    choices = _choices(result)
    message = _message(choices[0]) if choices else None
    said: Mapping[str, Any] = {**(message.response_metadata if message else {}), **(result.llm_output or {})}
    found = _usage(message, said)
    if model := said.get("model_name") or said.get("model"):
        found[semconv.GEN_AI_RESPONSE_MODEL] = str(model)
    if response_id := said.get("id") or _own_id(message):
        found[semconv.GEN_AI_RESPONSE_ID] = str(response_id)
    if reasons := [reason for choice in choices if (reason := finish_reason(choice))]:
        found[semconv.GEN_AI_RESPONSE_FINISH_REASONS] = reasons
    return found


def response_messages(result: LLMResult) -> Attributes:
    """The choices of the answer, or what a broken-off stream had said by then."""
    choices = _choices(result)
    return {semconv.GEN_AI_OUTPUT_MESSAGES: to_json(output_messages(choices))} if choices else {}


def _choices(result: LLMResult) -> list[Generation]:
    """The choices of the one request that a run stands for."""
    return list(result.generations[0]) if result.generations else []  # type: ignore[arg-type]


def _message(choice: Generation) -> AIMessage | None:
    message = choice.message if isinstance(choice, ChatGeneration) else None
    return message if isinstance(message, AIMessage) else None


def _usage(message: AIMessage | None, said: Mapping[str, Any]) -> Attributes:
    usage: Mapping[str, Any] = (message and message.usage_metadata) or {}
    counted = said.get("token_usage") or {}
    tokens = {
        semconv.GEN_AI_USAGE_INPUT_TOKENS: usage.get("input_tokens", counted.get("prompt_tokens")),
        semconv.GEN_AI_USAGE_OUTPUT_TOKENS: usage.get("output_tokens", counted.get("completion_tokens")),
    }
    return {name: count for name, count in tokens.items() if isinstance(count, int)}


def _own_id(message: AIMessage | None) -> str | None:
    """The message's id, unless LangChain made it up from the run's id."""
    if message is None or message.id is None or message.id.startswith(("lc_", "run-")):
        return None
    return message.id
