"""The agent that a span belongs to, read from the attributes of each known instrumentation."""

import json
from collections.abc import Iterator
from typing import Final

from agl import semconv
from agl.span import Span
from agl.trajectory.aliases import read_text

_PLACEHOLDERS: Final = {"LangGraph", "OpenAI Agent"}
"""Names of unnamed graphs (LangGraph) and of all agents (opentelemetry-instrumentation-openai-agents-v2)."""

_TRACELOOP_METADATA: Final = "traceloop.association.properties."


def agent_of(span: Span) -> str | None:
    """The role of `span` if it has one, else the name of its agent or graph node; None if it names neither."""
    return next((name for name in _names(span) if name and name not in _PLACEHOLDERS), None)


def _names(span: Span) -> Iterator[str | None]:
    """Names on the span, the most specific first."""
    yield span.role
    yield from _names_of_langchain(_langchain_metadata(span))
    yield read_text(span, semconv.GEN_AI_AGENT_NAME)
    yield from _names_of_kinds(span)
    # agentlightning reads these too: AutoGen's messages, agentops' LangChain handler, Agent Framework's workflows.
    yield from map(span.text, ("recipient_agent_type", "langchain.chain.type", "executor.id"))
    if span.name.startswith("langchain.Chain."):  # Weave's
        yield span.text("lc_name")


def _names_of_langchain(metadata: dict[str, object]) -> Iterator[str | None]:
    yield _text(metadata.get("agl_role"))
    yield _text(metadata.get("lc_agent_name"))
    # The nodes of a prebuilt agent are its steps ("model", "tools"), not agents; older versions do not tell them apart.
    if metadata.get("ls_integration", "langgraph") == "langgraph":
        yield _text(metadata.get("langgraph_node"))


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
    metadata = span.text("metadata")
    if metadata is None:
        prefixed = (name for name in span.attributes if name.startswith(_TRACELOOP_METADATA))
        return {name.removeprefix(_TRACELOOP_METADATA): span.attributes[name] for name in prefixed}
    try:
        data = json.loads(metadata)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
