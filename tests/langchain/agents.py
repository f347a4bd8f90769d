"""A LangGraph agent of two roles with a tool, as a user would write it, without any import of ours."""

from typing import Any

from langchain_core.tools import StructuredTool
from langgraph.graph import END, START, MessagesState, StateGraph
from opentelemetry import trace

TRACER = trace.get_tracer("the user's own")


def count_stock(item: str) -> int:
    """Count an item in stock. Fails for an item that is not a mug."""
    with TRACER.start_as_current_span("look into the database"):
        if item != "mug":
            raise LookupError(f"no {item} in the shop")
        return 7


async def acount_stock(item: str) -> int:
    return count_stock(item)


STOCK = StructuredTool.from_function(count_stock, acount_stock, name="stock")


def two_roles(model: Any) -> Any:
    """`planner` asks the model; `executor` asks it again with a tool, and runs the tool."""
    with_tool = model.bind_tools([STOCK])

    def plan(state: MessagesState) -> dict[str, Any]:
        return {"messages": [model.invoke(state["messages"])]}

    def execute(state: MessagesState) -> dict[str, Any]:
        with TRACER.start_as_current_span("think"):
            answer = with_tool.invoke(state["messages"])
        return {"messages": [answer, *(STOCK.invoke(call) for call in answer.tool_calls)]}

    return _graph(plan, execute)


def two_async_roles(model: Any) -> Any:
    """`two_roles` with coroutines as nodes."""
    with_tool = model.bind_tools([STOCK])

    async def plan(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(state["messages"])]}

    async def execute(state: MessagesState) -> dict[str, Any]:
        with TRACER.start_as_current_span("think"):
            answer = await with_tool.ainvoke(state["messages"])
        return {"messages": [answer, *[await STOCK.ainvoke(call) for call in answer.tool_calls]]}

    return _graph(plan, execute)


def _graph(plan: Any, execute: Any) -> Any:
    graph = StateGraph(MessagesState)
    graph.add_node("planner", plan)
    graph.add_node("executor", execute)
    graph.add_edge(START, "planner")
    graph.add_edge("planner", "executor")
    graph.add_edge("executor", END)
    return graph.compile()
