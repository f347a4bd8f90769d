"""The agent of a span, read from rarer attributes. tests/foreign runs the real instrumentations."""

import json
from typing import Any

import pytest

from agl.trajectory.attributes import agent_of
from tests.core.span_maker import span

NODE = {"ls_integration": "langgraph", "langgraph_node": "planner"}
STEP = {"langgraph_node": "model"}


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
@pytest.mark.parametrize(
    ("path", "created", "name"),
    [
        ("model:1", None, None),
        ("agent:1", None, None),
        ("Summary.before_model:1", None, None),
        ("model:1", "writer", "writer"),
        ("shop:1|model:2", None, "shop"),
        ("shop:1|model:2", "keeper", "keeper"),
        ("boss:1|critic:2", "boss", "critic"),
        ("boss:1|tools:2|critic:3", "boss", "critic"),
        ("boss:1|tools:2|agent:3", "boss", None),
        ("boss:1|tools:2|shop:3|agent:4", "boss", "shop"),
        ("boss:1|tools:2", None, "boss"),
    ],
)
def test_steps_are_not_agents_and_an_agent_in_a_tool_is_not_its_caller(
    spell: Any, path: str, created: str | None, name: str | None
) -> None:
    node = path.rpartition("|")[2].partition(":")[0]
    metadata = {"langgraph_node": node, "langgraph_checkpoint_ns": path, "ls_integration": "langchain_chat_model"}

    assert agent_of(span("x", spell(metadata | ({"lc_agent_name": created} if created else {})))) == name


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
