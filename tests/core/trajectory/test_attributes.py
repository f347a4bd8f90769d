"""The agent of a span, read from rarer attributes. tests/foreign runs the real instrumentations."""

import json
from typing import Any

import pytest

from agl.trajectory.attributes import agent_of
from tests.core.span_maker import span

NODE = {"ls_integration": "langgraph", "langgraph_node": "planner"}
STEP = {"ls_integration": "langchain_create_agent", "langgraph_node": "model"}


def openinference(metadata: Any) -> dict[str, Any]:
    return {"openinference.span.kind": "LLM", "metadata": json.dumps(metadata)}


def openllmetry(metadata: dict[str, Any]) -> dict[str, Any]:
    return {f"traceloop.association.properties.{key}": value for key, value in metadata.items()}


@pytest.mark.parametrize("spell", [openinference, openllmetry])
def test_langchain_metadata_is_read_in_every_form(spell: Any) -> None:
    assert agent_of(span("x", spell(NODE))) == "planner"
    assert agent_of(span("x", spell({"langgraph_node": "planner"}))) == "planner"
    assert agent_of(span("x", spell(STEP | {"lc_agent_name": "writer"}))) == "writer"
    assert agent_of(span("x", spell(NODE | {"lc_agent_name": "writer", "agl_role": "critic"}))) == "critic"
    assert agent_of(span("x", spell(NODE) | {"agl.role": "stated"})) == "stated"


@pytest.mark.parametrize("spell", [openinference, openllmetry])
def test_the_steps_of_a_prebuilt_agent_are_not_agents(spell: Any) -> None:
    assert agent_of(span("x", spell(STEP))) is None
    assert agent_of(span("x", spell(NODE | {"ls_integration": "langchain_chat_model"}))) is None


@pytest.mark.parametrize(
    ("attributes", "name"),
    [
        ({"gen_ai.agent.name": "planner"}, "planner"),
        ({"agent.name": "planner"}, "planner"),
        ({"gen_ai.agent.name": "LangGraph"}, None),
        ({"gen_ai.agent.name": "OpenAI Agent"}, None),
        ({"openinference.span.kind": "AGENT", "graph.node.id": "planner"}, "planner"),
        ({"openinference.span.kind": "TOOL", "graph.node.id": "planner"}, None),
        ({"traceloop.span.kind": "agent", "traceloop.entity.name": "planner"}, "planner"),
        ({"traceloop.span.kind": "workflow", "traceloop.entity.name": "planner"}, None),
        ({"agentops.span.kind": "agent", "operation.name": "planner"}, "planner"),
        ({"agentops.span.kind": "session", "operation.name": "planner"}, None),
        ({"recipient_agent_type": "planner"}, "planner"),
        ({"executor.id": "planner"}, "planner"),
        ({"type": "agent", "agentlightning.operation.input.name": "planner"}, "planner"),
        ({"lc_name": "planner"}, None),
        ({"metadata": "[]"}, None),
        ({"metadata": "{"}, None),
        ({"metadata": json.dumps({"langgraph_node": 7})}, None),
    ],
)
def test_the_agent_is_read_from_each_instrumentation(attributes: dict[str, Any], name: str | None) -> None:
    assert agent_of(span("x", attributes)) == name


def test_weave_names_an_agent_on_a_langchain_span() -> None:
    assert agent_of(span("langchain.Chain.planner", {"lc_name": "planner"})) == "planner"
