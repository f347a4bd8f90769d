"""What a model call says of itself: the attributes of its request and of its answer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, Generation, LLMResult
from opentelemetry.util.types import AttributeValue

from agl import semconv
from agl.tokens.capture import Capture, Choice
from agl_langchain._messages import finish_reason, output_messages, to_json

Attributes = dict[str, AttributeValue]


@dataclass(frozen=True, slots=True)
class CapturedCall:
    """A model call, and its answer as the engine gave it: filled where the model captures token ids."""

    request: Attributes
    """What the call's span says from its start."""
    answer: Capture = field(default_factory=Capture)

    def attributes(self) -> Attributes:
        """Response id, and the tokens of the first choice."""
        choices = self.answer.choices()
        return {**self._response_id(), **choices[0].token_attributes()} if choices else {}

    def of_choices(self) -> list[Attributes]:
        """Attributes of a span for each choice, where the request asked for several: a span holds the ids of one."""
        choices = self.answer.choices()
        return [self._of_choice(choice) for choice in choices] if len(choices) > 1 else []

    def _of_choice(self, choice: Choice) -> Attributes:
        reason = choice.finish_reason
        return {
            **self.request,
            **self._response_id(),
            semconv.GATEWAY_CHOICE: choice.index,
            **({semconv.GEN_AI_RESPONSE_FINISH_REASONS: [reason]} if reason else {}),
            **choice.token_attributes(),
        }

    def _response_id(self) -> Attributes:
        return {semconv.GEN_AI_RESPONSE_ID: self.answer.response_id} if self.answer.response_id else {}


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
