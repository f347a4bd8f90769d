"""The role on a span: set by the caller, else mapped, else the name of node or agent."""

from typing import Any

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import StructuredTool
from langgraph.graph import START, MessagesState, StateGraph
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import agl
from agl.errors import ConfigError
from agl_langchain import AglCallbackHandler
from langchain.agents import create_agent
from tests.autogen.span_tree import attributes, named, only, tree
from tests.langchain.agents import STOCK
from tests.langchain.conftest import MakeModel

MODEL = FakeListChatModel(responses=["Seven."])
QUESTION = {"messages": [("user", "How many mugs?")]}


def graph_with(name: str, node: Any) -> Any:
    graph = StateGraph(MessagesState)
    graph.add_node(name, node)
    graph.add_edge(START, name)
    return graph.compile()


def answer(state: MessagesState) -> dict[str, Any]:
    return {"messages": [MODEL.invoke(state["messages"])]}


def role_of_chat(spans: InMemorySpanExporter) -> object:
    return attributes(only(spans.get_finished_spans(), "chat")).get("agl.role")


def test_precedence_of_roles(spans: InMemorySpanExporter) -> None:
    graph = graph_with("rewrite_query", answer)
    mapped = AglCallbackHandler(roles={"writer": "write_query|rewrite.*", "late": ".*"})
    stated = {"tags": ["role:by-tag"], "metadata": {"agl_role": "by-metadata"}}

    def run(handler: AglCallbackHandler, **config: Any) -> object:
        spans.clear()
        graph.invoke(QUESTION, {"callbacks": [handler], **config})
        return role_of_chat(spans)

    with agl.role("in-force"):
        assert run(mapped, **stated) == "in-force"
    assert run(mapped, **stated) == "by-metadata"
    assert run(mapped, tags=["role:by-tag"]) == "by-tag"
    assert run(mapped) == "writer"
    assert run(AglCallbackHandler()) == "rewrite_query"


def test_the_tag_nearest_to_the_call_wins(instrumented: InMemorySpanExporter) -> None:
    near = MODEL.with_config(tags=["role:near"])

    RunnableLambda(lambda _: near.invoke("hello")).invoke(None, {"tags": ["role:far"]})

    assert role_of_chat(instrumented) == "near"


def test_a_mapping_applies_to_chains_outside_of_graphs(spans: InMemorySpanExporter) -> None:
    handler = AglCallbackHandler(roles={"writer": "write_.*"})

    RunnableLambda(lambda _: MODEL.invoke("hello")).with_config(run_name="write_query").invoke(
        None, {"callbacks": [handler]}
    )

    assert role_of_chat(spans) == "writer"


def test_without_any_name_there_is_no_role(instrumented: InMemorySpanExporter) -> None:
    MODEL.invoke("hello")

    assert role_of_chat(instrumented) is None


def test_a_call_without_config_has_the_role_of_the_run_around_it(instrumented: InMemorySpanExporter) -> None:
    def write(state: MessagesState) -> dict[str, Any]:
        return {"messages": [MODEL.generate([state["messages"]]).generations[0][0].text]}

    graph_with("writer", write).invoke(QUESTION)

    assert role_of_chat(instrumented) == "writer"


def test_a_handler_on_the_model_alone_finds_the_node(spans: InMemorySpanExporter) -> None:
    model = FakeListChatModel(responses=["Seven."], callbacks=[AglCallbackHandler()])

    graph_with("writer", lambda state: {"messages": [model.invoke(state["messages"])]}).invoke(QUESTION)

    assert role_of_chat(spans) == "writer"


def test_the_role_of_a_prebuilt_agent_is_its_name_or_node_not_its_steps(
    instrumented: InMemorySpanExporter, make_model: MakeModel
) -> None:
    named_agent = create_agent(make_model(), [STOCK], name="keeper")
    agent = create_agent(make_model(), [STOCK])

    graph_with("shop", named_agent).invoke(QUESTION)
    assert tree(instrumented.get_finished_spans()) == (
        "invoke_workflow LangGraph\n"
        "  invoke_agent shop [shop]\n"
        "    invoke_agent keeper [keeper]\n"
        "      model\n"
        "        chat tiny [keeper]\n"
        "      tools\n"
        "        execute_tool stock [keeper]\n"
        "          look into the database\n"
        "      model\n"
        "        chat tiny [keeper]"
    )

    instrumented.clear()
    graph_with("shop", agent).invoke(QUESTION)
    calls = named(instrumented.get_finished_spans(), "chat tiny")
    assert [attributes(span)["agl.role"] for span in calls] == ["shop", "shop"]


def test_a_graph_in_an_agents_tool_has_its_own_roles(instrumented: InMemorySpanExporter) -> None:
    inner = graph_with("critic", answer)

    def outer(state: MessagesState) -> dict[str, Any]:
        return inner.invoke(state)

    graph_with("author", outer).invoke(QUESTION)

    assert role_of_chat(instrumented) == "critic"


def test_a_mapped_role_is_not_inherited_by_an_agent_in_a_tool(spans: InMemorySpanExporter) -> None:
    handler = AglCallbackHandler(roles={"writer": "author", "judge": "crit.*"})

    def ask(state: MessagesState, inner: Any) -> Any:
        return StructuredTool.from_function(lambda: inner.invoke(QUESTION), name="ask", description="-").invoke({})

    for node, role in {"critic": "judge", "editor": "editor", "agent": None}.items():
        inner = graph_with(node, answer)
        spans.clear()
        graph_with("author", lambda state, inner=inner: ask(state, inner)).invoke(QUESTION, {"callbacks": [handler]})
        assert role_of_chat(spans) == role


def test_an_invalid_regular_expression_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"roles\['writer'\] is '\(', expected a regular expression"):
        AglCallbackHandler(roles={"writer": "("})
