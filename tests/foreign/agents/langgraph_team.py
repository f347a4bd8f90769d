"""The team on LangGraph: nodes `planner` and `executor`."""

from typing import Any

from exporting import STREAMING
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph


@tool
def count_stock(item: str) -> str:
    """Count an item in stock."""
    return "7"


def run(question: str) -> None:
    model = ChatOpenAI(model="team@3", streaming=STREAMING)
    with_tool = model.bind_tools([count_stock])

    def plan(state: MessagesState) -> dict[str, Any]:
        return {"messages": [model.invoke([SystemMessage("You plan."), *state["messages"]])]}

    def execute(state: MessagesState) -> dict[str, Any]:
        messages = [SystemMessage("You do."), HumanMessage(state["messages"][-1].text)]
        messages.append(with_tool.invoke(messages))
        messages += [count_stock.invoke(call) for call in messages[-1].tool_calls]
        return {"messages": [with_tool.invoke(messages)]}

    graph = StateGraph(MessagesState)
    graph.add_node("planner", plan)
    graph.add_node("executor", execute)
    graph.add_edge(START, "planner").add_edge("planner", "executor").add_edge("executor", END)
    graph.compile().invoke({"messages": [HumanMessage(question)]})
