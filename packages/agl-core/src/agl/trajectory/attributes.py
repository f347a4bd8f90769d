"""Reads tokens, counts and the agent's name from span attributes, also as other instrumentations write them."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from agl import semconv
from agl.role_map import agent_in_metadata
from agl.span import AttributeValue, Span
from agl.tokens.packing import array_of_ids, check_ids, check_logprobs, pack_ids, unpack_ids, unpack_logprobs

ALIASES: Final[Mapping[str, tuple[str, ...]]] = {
    semconv.GEN_AI_AGENT_NAME: ("agent.name",),
    semconv.GEN_AI_REQUEST_MODEL: ("llm.model_name",),
    semconv.GEN_AI_RESPONSE_FINISH_REASONS: ("llm.finish_reason", "gen_ai.completion.0.finish_reason"),
    semconv.GEN_AI_USAGE_INPUT_TOKENS: ("gen_ai.usage.prompt_tokens", "llm.token_count.prompt"),
    semconv.GEN_AI_USAGE_OUTPUT_TOKENS: ("gen_ai.usage.completion_tokens", "llm.token_count.completion"),
    semconv.PROMPT_TOKEN_IDS: ("prompt_token_ids",),
    semconv.RESPONSE_TOKEN_IDS: ("response_token_ids",),
    semconv.RESPONSE_LOGPROBS: ("response_logprobs", "logprobs.content"),
    semconv.REWARD_VALUE: ("agentlightning.reward.0.value",),
}
"""Our attribute names, and their names in other tools. Ours is read first."""

_PLACEHOLDERS: Final = {"LangGraph", "OpenAI Agent"}
"""Names of unnamed graphs (LangGraph) and of all agents (opentelemetry-instrumentation-openai-agents-v2)."""

_TRACELOOP_METADATA: Final = "traceloop.association.properties."


def read(span: Span, name: str) -> AttributeValue | None:
    """Attribute `name` of `span`, under the first of its names that is present.

    Our names are read from the span only, those of other tools also from the resource: agentlightning writes ids there.
    """
    if name in span.attributes:
        return span.attributes[name]
    holders = (span.attributes, span.resource)
    return next((holder[alias] for alias in ALIASES.get(name, ()) for holder in holders if alias in holder), None)


def read_text(span: Span, name: str) -> str | None:
    """Attribute `name` if it is a non-empty string."""
    value = read(span, name)
    return value if isinstance(value, str) and value else None


def parse_json(text: str) -> Any:
    """The JSON value in `text`. Raises ValueError if it is not JSON, or nested too deeply to read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error


def read_object(span: Span, name: str) -> dict[str, Any]:
    """Attribute `name` as a JSON object; else empty."""
    try:
        value = parse_json(read_text(span, name) or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def read_texts(span: Span, name: str) -> list[str]:
    """Attribute `name` as a list of strings: an array, a JSON array, or a single string; else empty."""
    value = read(span, name)
    if isinstance(value, str) and value.startswith("["):
        try:
            value = parse_json(value)
        except ValueError:
            return []
    if isinstance(value, str):
        return [value] if value else []
    return [str(item) for item in value] if isinstance(value, list) else []


def read_number(span: Span, name: str) -> float | None:
    """Attribute `name` if it is a finite number (not a bool)."""
    value = read(span, name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


def read_ids(span: Span, name: str) -> bytes | None:
    """Token ids as packed bytes, from packed bytes, an array or a JSON array. Raises ValueError if they are broken."""
    value = _decoded(span, name)
    if value is None:
        return None
    if not isinstance(value, bytes):
        return pack_ids(unpack_ids(value))
    check_ids(array_of_ids(value))
    return value


def read_logprobs(span: Span, name: str) -> list[float] | None:
    """Logprobs from packed bytes, an array, or OpenAI's JSON (`[{"logprob": ...}]`). Raises ValueError if broken."""
    value = _decoded(span, name)
    if value is None:
        return None
    if isinstance(value, list) and all(isinstance(item, dict) and "logprob" in item for item in value):
        value = [item["logprob"] for item in value]
    return check_logprobs(unpack_logprobs(value))


def agent_of(span: Span) -> str | None:
    """The role of `span` if it has one, else the name of its agent or graph node; None if it names neither."""
    return next((name for name in _names(span) if name and name not in _PLACEHOLDERS), None)


def _decoded(span: Span, name: str) -> Any:
    """Attribute `name` as bytes or a list; a string is parsed as JSON."""
    value = read(span, name)
    if isinstance(value, str):
        value = parse_json(value)
    if value is not None and not isinstance(value, bytes | list | tuple):
        raise ValueError(f"{name} is {type(value).__name__}, expected packed bytes or an array of numbers")
    return value


def _names(span: Span) -> Iterator[str | None]:
    """Names on the span, the most specific first."""
    yield span.role
    metadata = _langchain_metadata(span)
    yield _text(metadata.get("agl_role"))
    yield agent_in_metadata(metadata)
    yield read_text(span, semconv.GEN_AI_AGENT_NAME)
    yield from _names_of_kinds(span)
    # agentlightning reads these too: AutoGen's messages, agentops' LangChain handler, Agent Framework's workflows.
    yield from map(span.text, ("recipient_agent_type", "langchain.chain.type", "executor.id"))
    if span.name.startswith("langchain.Chain."):  # Weave's
        yield span.text("lc_name")


def _names_of_kinds(span: Span) -> Iterator[str | None]:
    """Names that belong to an agent only if the span has the kind of an agent."""
    if span.text("openinference.span.kind") == "AGENT":
        yield span.text("graph.node.name")
        yield span.text("graph.node.id")
    if span.text("traceloop.span.kind") == "agent":
        yield span.text("traceloop.entity.name")
    if span.text("agentops.span.kind") == "agent":
        yield span.text("operation.name")
    if span.text("type") == "agent":  # Weave's
        yield span.text("agentlightning.operation.input.name")


def _langchain_metadata(span: Span) -> dict[str, object]:
    """Metadata of the LangChain run: OpenInference writes it as JSON, OpenLLMetry as one attribute per key."""
    if span.text("metadata") is not None:
        return read_object(span, "metadata")
    prefixed = (name for name in span.attributes if name.startswith(_TRACELOOP_METADATA))
    return {name.removeprefix(_TRACELOOP_METADATA): span.attributes[name] for name in prefixed}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
