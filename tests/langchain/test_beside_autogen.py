"""Agents of one framework nested in agents of the other: each has its own role, unless `agl.role` sets one."""

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.language_models import FakeListChatModel
from langgraph.graph import START, MessagesState, StateGraph
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import agl
from agl_autogen import AutoGenInstrumentor
from langchain.agents import create_agent
from tests.autogen.scripted import agent, calls
from tests.autogen.span_tree import named, tree

MODEL = FakeListChatModel(responses=["Seven."])


@pytest.fixture
def both(instrumented: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    AutoGenInstrumentor().instrument()
    yield instrumented
    AutoGenInstrumentor().uninstrument()


def graph_of(node: Any) -> Any:
    graph = StateGraph(MessagesState)
    graph.add_node("counter", node)
    graph.add_edge(START, "counter")
    return graph.compile()


def question(text: str) -> Any:
    return {"messages": [("user", text)]}


def answer(state: MessagesState) -> dict[str, Any]:
    return {"messages": [MODEL.invoke(state["messages"])]}


@pytest.mark.parametrize(
    ("config", "role"),
    [({}, "counter"), ({"metadata": {"agl_role": "marked"}}, "marked"), ({"tags": ["role:tagged"]}, "tagged")],
)
async def test_a_graph_in_a_tool_of_an_autogen_agent_has_the_roles_of_its_nodes(
    both: InMemorySpanExporter, config: dict[str, Any], role: str
) -> None:
    graph = graph_of(answer)

    async def count(item: str) -> str:
        """Count items."""
        return (await graph.ainvoke({"messages": [("user", item)]}, config))["messages"][-1].text

    executor = agent("executor", calls("count", item="mug"), tools=[count])
    both.clear()
    await executor.run(task="How many mugs?")
    assert tree(both.get_finished_spans()).splitlines() == [
        "invoke_agent executor [executor]",
        "  chat [executor]",
        "  execute_tool count [executor]",
        "    invoke_workflow LangGraph [executor]",
        f"      invoke_agent counter [{role}]",
        f"        chat [{role}]",
    ]


async def test_a_role_set_by_the_user_applies_to_agents_of_both_frameworks(both: InMemorySpanExporter) -> None:
    graph = graph_of(answer)

    async def count(item: str) -> str:
        """Count items."""
        return graph.invoke({"messages": [("user", item)]}, {"metadata": {"agl_role": "marked"}})["messages"][-1].text

    executor = agent("executor", calls("count", item="mug"), tools=[count])
    both.clear()
    with agl.role("stated"):
        await executor.run(task="How many mugs?")
    lines = tree(both.get_finished_spans()).splitlines()
    assert len(lines) == 6
    assert all(line.endswith(" [stated]") for line in lines)


async def test_a_model_call_in_a_tool_has_the_role_of_the_agent_that_called_the_tool(
    both: InMemorySpanExporter,
) -> None:
    async def count(item: str) -> str:
        """Count items."""
        return MODEL.invoke(item).text

    executor = agent("executor", calls("count", item="mug"), tools=[count])
    both.clear()
    await executor.run(task="How many mugs?")
    assert tree(both.get_finished_spans()).splitlines()[-1] == "    chat [executor]"


async def test_a_team_in_a_node_of_a_graph_has_the_roles_of_its_agents(both: InMemorySpanExporter) -> None:
    executor = agent("executor", "Seven.")

    async def ask(state: MessagesState) -> dict[str, Any]:
        return {"messages": [(await executor.run(task="How many?")).messages[-1].to_text()]}  # type: ignore[union-attr]

    graph = graph_of(ask)
    both.clear()
    await graph.ainvoke({"messages": [("user", "How many mugs?")]})
    assert tree(both.get_finished_spans()).splitlines() == [
        "invoke_workflow LangGraph",
        "  invoke_agent counter [counter]",
        "    invoke_agent executor [executor]",
        "      chat [executor]",
    ]


async def test_an_agent_without_a_name_in_a_tool_does_not_act_as_the_caller(both: InMemorySpanExporter) -> None:
    inner = create_agent(MODEL, [])

    async def count(item: str) -> str:
        """Count items."""
        return (await inner.ainvoke(question(item)))["messages"][-1].text

    executor = agent("executor", calls("count", item="mug"), tools=[count])
    both.clear()
    await executor.run(task="How many mugs?")
    roles = [(span.attributes or {}).get("agl.role") for span in named(both.get_finished_spans(), "chat")]
    assert roles == ["executor", None]
