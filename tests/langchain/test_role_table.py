"""The role in each way to build an agent with LangChain or LangGraph, as the table of docs/02 states it."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from langchain.agents.middleware import before_model
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import BaseTool, StructuredTool
from langgraph.func import entrypoint, task
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Send
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agl_langchain import AglCallbackHandler
from langchain.agents import create_agent
from tests.autogen.span_tree import attributes
from tests.role_table import roles_in_order, table

with warnings.catch_warnings(action="ignore"):  # some versions of LangGraph warn that it moved
    from langgraph.prebuilt import create_react_agent
    from langgraph_supervisor import create_supervisor
    from langgraph_swarm import create_handoff_tool, create_swarm

QUESTION = {"messages": [("user", "How many mugs?")]}


class Model(BaseChatModel):
    """Calls `tool` once, if it has one, and then answers."""

    tool: str = ""

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        asks = bool(self.tool) and messages[-1].type != "tool"
        called = [{"name": self.tool, "args": {}, "id": "c1", "type": "tool_call"}] if asks else []
        return ChatResult(generations=[ChatGeneration(message=AIMessage("" if asks else "Seven.", tool_calls=called))])


def answer(state: MessagesState) -> dict[str, Any]:
    return {"messages": [Model().invoke(state["messages"])]}


def graph(name: str | None = None, /, **nodes: Any) -> Any:
    """A graph of these nodes, one after the other."""
    built = StateGraph(MessagesState)
    last = START
    for node, action in nodes.items():
        built.add_node(node, action)
        built.add_edge(last, node)
        last = node
    return built.compile(name=name)


def tool_that_runs(agent: Any) -> BaseTool:
    def ask() -> str:
        return agent.invoke(QUESTION)["messages"][-1].text

    return StructuredTool.from_function(ask, name="ask", description="Asks another agent.")


def tool_that_calls_a_model() -> BaseTool:
    return StructuredTool.from_function(lambda: Model().invoke("Seven?").text, name="ask", description="Asks a model.")


def created(name: str | None = None, tools: tuple[BaseTool, ...] = (), **options: Any) -> Any:
    return create_agent(Model(tool=tools[0].name if tools else ""), list(tools), name=name, **options)


def react(name: str | None = None, tools: tuple[BaseTool, ...] = (), **options: Any) -> Any:
    with warnings.catch_warnings(action="ignore"):
        return create_react_agent(Model(tool=tools[0].name if tools else ""), list(tools), name=name, **options)


def caller(make: Callable[..., Any], inner: Any) -> Any:
    """Agent `boss` whose tool runs `inner`."""
    return make("boss", (tool_that_runs(inner),))


def fan_out() -> Any:
    built = StateGraph(MessagesState)
    built.add_node("worker", answer)
    built.add_conditional_edges(START, lambda state: [Send("worker", state), Send("worker", state)])
    return built.compile()


def middleware() -> Any:
    @before_model
    def think(state: Any, runtime: Any) -> None:
        Model().invoke("Think.")

    return think


def swarm(make: Callable[..., Any]) -> Any:
    alice = make("alice", (create_handoff_tool(agent_name="bob"),))
    return create_swarm([alice, make("bob")], default_active_agent="alice").compile()


def supervisor(**options: Any) -> Any:
    with warnings.catch_warnings(action="ignore"):
        return create_supervisor([react("bob")], model=Model(tool="transfer_to_bob"), **options).compile()


def functional(names: tuple[str, str] = ("author", "critic")) -> Any:
    """An entrypoint that calls a model itself and in a task."""

    @task(name=names[1])
    def review(question: Any) -> str:
        return Model().invoke("Seven?").text

    def write(question: Any) -> dict[str, Any]:
        Model().invoke("How many mugs?")
        return {"messages": [AIMessage(review(question).result())]}

    write.__name__ = names[0]
    return entrypoint()(write)


WAYS: dict[str, Callable[[], Any]] = {
    "a model without an agent": Model,
    "node `planner`": lambda: graph(planner=answer),
    "node `planner` of a graph with a name": lambda: graph("team", planner=answer),
    "nodes `planner` and `agent` of a graph without a name": lambda: graph(planner=answer, agent=answer),
    "nodes `planner` and `agent` of graph `team`": lambda: graph("team", planner=answer, agent=answer),
    "node `worker`, started twice by `Send`": fan_out,
    "node `critic` of a graph that is node `boss`": lambda: graph(boss=graph("inner", critic=answer)),
    "node `critic` of a graph that node `boss` calls": lambda: graph(
        boss=lambda state: graph(critic=answer).invoke(state)
    ),
    '`create_agent(name="planner")`': lambda: created("planner"),
    '`create_agent(name="planner")` with `run_name` in the config': lambda: created("planner").with_config(
        run_name="task-17"
    ),
    "`create_agent()`": created,
    '`create_agent(name="planner")` with middleware that calls a model': lambda: created(
        "planner", middleware=[middleware()]
    ),
    "`create_agent()` with middleware that calls a model": lambda: created(middleware=[middleware()]),
    '`create_agent(name="planner")` with a tool that calls a model': lambda: created(
        "planner", (tool_that_calls_a_model(),)
    ),
    '`create_agent(name="keeper")` as node `shop`': lambda: graph(shop=created("keeper")),
    "`create_agent()` as node `shop`": lambda: graph(shop=created()),
    '`create_react_agent(name="planner")`': lambda: react("planner"),
    '`create_react_agent(name="planner")` with `run_name` in the config': lambda: react("planner").with_config(
        run_name="task-17"
    ),
    "`create_react_agent()`": react,
    '`create_react_agent(name="planner")` with hooks that call a model': lambda: react(
        "planner",
        pre_model_hook=lambda state: {"llm_input_messages": [Model().invoke("Sum up.")]},
        post_model_hook=answer,
    ),
    '`create_react_agent(name="keeper")` as node `shop`': lambda: graph(shop=react("keeper")),
    "`create_react_agent()` as node `shop`": lambda: graph(shop=react()),
    "`create_swarm` of `create_react_agent`": lambda: swarm(react),
    "`create_swarm` of `create_agent`": lambda: swarm(created),
    "`create_supervisor`": supervisor,
    '`create_supervisor(supervisor_name="chief")`': lambda: supervisor(supervisor_name="chief"),
    "`@entrypoint` `author` and `@task` `critic`": functional,
    "`@entrypoint` `agent` and `@task` `call_model`": lambda: functional(("agent", "call_model")),
    '`create_agent(name="sub")` in a tool of `create_agent`': lambda: caller(created, created("sub")),
    '`create_agent(name="sub")` in a tool of `create_react_agent`': lambda: caller(react, created("sub")),
    "`create_agent()` in a tool of `create_agent`": lambda: caller(created, created()),
    "`create_agent()` in a tool of `create_react_agent`": lambda: caller(react, created()),
    '`create_react_agent(name="sub")` in a tool of `create_agent`': lambda: caller(created, react("sub")),
    '`create_react_agent(name="sub")` in a tool of `create_react_agent`': lambda: caller(react, react("sub")),
    "`create_react_agent()` in a tool of `create_agent`": lambda: caller(created, react()),
    "`create_react_agent()` in a tool of `create_react_agent`": lambda: caller(react, react()),
    "graph with node `critic` in a tool": lambda: caller(created, graph(critic=answer)),
    "`create_swarm` in a tool": lambda: caller(created, swarm(created)),
    "`@entrypoint` `author` and `@task` `critic` in a tool": lambda: caller(created, functional()),
}
"""Each way to build an agent. The calling agent is always `boss`."""


def roles(spans: InMemorySpanExporter, agent: Any, **config: Any) -> list[object]:
    spans.clear()
    agent.invoke("How many mugs?" if isinstance(agent, Model) else QUESTION, config)
    finished = sorted(spans.get_finished_spans(), key=lambda span: span.start_time or 0)
    return [attributes(span).get("agl.role") for span in finished if span.name == "chat"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_table_states_the_role_in_each_way(instrumented: InMemorySpanExporter) -> None:
    made = {way: roles_in_order(roles(instrumented, make())) for way, make in WAYS.items()}

    assert made == table("built with LangChain or LangGraph")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_handler_alone_finds_the_same_roles(spans: InMemorySpanExporter) -> None:
    """Except for a `run_name`, which hides the name of a graph unless `create_agent` made it."""
    hidden = next(way for way in WAYS if way.startswith("`create_react") and "run_name" in way)
    callbacks = [AglCallbackHandler()]
    made = {way: roles_in_order(roles(spans, make(), callbacks=callbacks)) for way, make in WAYS.items()}

    assert made == table("built with LangChain or LangGraph") | {hidden: "`task-17`"}
