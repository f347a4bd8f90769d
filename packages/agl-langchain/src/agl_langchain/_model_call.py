"""A model call: the span attributes of its request and response, and the token ids captured from the response."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, Generation, LLMResult
from opentelemetry.util.types import AttributeValue

from agl import semconv
from agl.tokens.capture import Capture, Choice
from agl_langchain._messages import finish_reason, output_messages, to_json

Attributes = dict[str, AttributeValue]


@dataclass(slots=True)
class ModelCall:
    """A model call, and its captured response if `capture_token_ids` was applied to the model."""

    request: Attributes
    """Attributes that the span has from its start."""
    captured: Capture | None = None

    def captured_attributes(self) -> Attributes:
        """Response id, and token ids and logprobs of the first choice."""
        choices = self._choices()
        return {**self._response_id(), **choices[0].token_attributes()} if choices else {}

    def choice_attributes(self) -> list[Attributes]:
        """If the response has several choices: the attributes of a span for each, as a span holds the ids of one."""
        choices = self._choices()
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
        response_id = self.captured and self.captured.response_id
        return {semconv.GEN_AI_RESPONSE_ID: response_id} if response_id else {}

    def _choices(self) -> Sequence[Choice]:
        return self.captured.choices() if self.captured else ()


def request_attributes(parameters: Mapping[str, Any], metadata: Mapping[str, Any]) -> Attributes:
    """Model, provider and sampling settings, from the request's parameters and LangChain's metadata of the model."""
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
    """The tools offered to the model, in the form that its client receives."""
    tools = parameters.get("tools")
    return {semconv.GEN_AI_TOOL_DEFINITIONS: to_json(tools)} if tools else {}


def response_attributes(result: LLMResult) -> Attributes:
    """Model, id, usage and finish reasons, as far as the response has them.

    A streamed response of `ChatOpenAI` has no id here, because LangChain drops it.
    """
    choices = _choices(result)
    message = _message(choices[0]) if choices else None
    metadata: Mapping[str, Any] = {**(message.response_metadata if message else {}), **(result.llm_output or {})}
    found = _usage(message, metadata)
    if model := metadata.get("model_name") or metadata.get("model"):
        found[semconv.GEN_AI_RESPONSE_MODEL] = str(model)
    if response_id := metadata.get("id") or _provider_id(message):
        found[semconv.GEN_AI_RESPONSE_ID] = str(response_id)
    if message is not None and (message.usage_metadata or {}).get("total_cost") == 0:
        found[semconv.RESPONSE_CACHED] = True  # LangChain marks an answer of its cache by this
    if reasons := [reason for choice in choices if (reason := finish_reason(choice))]:
        found[semconv.GEN_AI_RESPONSE_FINISH_REASONS] = reasons
    return found


def response_messages(result: LLMResult) -> Attributes:
    """The choices of the response; of an interrupted stream, the part received so far."""
    choices = _choices(result)
    return {semconv.GEN_AI_OUTPUT_MESSAGES: to_json(output_messages(choices))} if choices else {}


def _choices(result: LLMResult) -> list[Generation]:
    """The choices of the run's one request."""
    return list(result.generations[0]) if result.generations else []  # type: ignore[arg-type]


def _message(choice: Generation) -> AIMessage | None:
    message = choice.message if isinstance(choice, ChatGeneration) else None
    return message if isinstance(message, AIMessage) else None


def _usage(message: AIMessage | None, metadata: Mapping[str, Any]) -> Attributes:
    usage: Mapping[str, Any] = (message and message.usage_metadata) or {}
    counts = metadata.get("token_usage") or {}
    tokens = {
        semconv.GEN_AI_USAGE_INPUT_TOKENS: usage.get("input_tokens", counts.get("prompt_tokens")),
        semconv.GEN_AI_USAGE_OUTPUT_TOKENS: usage.get("output_tokens", counts.get("completion_tokens")),
    }
    return {name: count for name, count in tokens.items() if isinstance(count, int)}


def _provider_id(message: AIMessage | None) -> str | None:
    """The message's id, unless LangChain derived it from the run's id."""
    if message is None or message.id is None or message.id.startswith(("lc_", "run-")):
        return None
    return message.id
