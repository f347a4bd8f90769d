"""A LangGraph agent that answers questions about the shop: `writer` writes SQL, `fixer` gets one try to correct it.

It contains nothing about training: its models are the ones that OPENAI_BASE_URL serves as `writer` and `fixer`.
"""

import os
from functools import lru_cache
from typing import Any, TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph

from examples.sql_agent import database
from examples.sql_agent.prompts import Message, extract_sql, fixer_messages, writer_messages

MAX_TOKENS = 64


class State(TypedDict):
    """State that the nodes of the graph pass on."""

    question: str
    sql: str
    error: str | None
    fixed: bool


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Answer `task["question"]`; returns `{"sql": str, "fixed": bool, "error": str | None}`.

    `fixed`: whether the fixer was called. `error`: why the final query failed, or None.
    """
    graph = _graph(os.environ.get("OPENAI_BASE_URL"))
    state = graph.invoke({"question": task["question"], "sql": "", "error": None, "fixed": False})
    return {key: state[key] for key in ("sql", "fixed", "error")}


@lru_cache(maxsize=8)
def _graph(base_url: str | None) -> CompiledStateGraph:
    """The compiled graph with the models at `base_url`. It holds no state, so threads can share it."""
    writer = ChatOpenAI(model="writer", base_url=base_url, max_completion_tokens=MAX_TOKENS)
    fixer = ChatOpenAI(model="fixer", base_url=base_url, max_completion_tokens=MAX_TOKENS)

    def write(state: State) -> dict[str, Any]:
        return _attempt(writer, writer_messages(state["question"]))

    def fix(state: State) -> dict[str, Any]:
        messages = fixer_messages(state["question"], state["sql"], state["error"] or "")
        return _attempt(fixer, messages) | {"fixed": True}

    graph = StateGraph(State)
    graph.add_node("writer", write)
    graph.add_node("fixer", fix)
    graph.add_edge(START, "writer")
    graph.add_conditional_edges("writer", _after_writer, ["fixer", END])
    graph.add_edge("fixer", END)
    return graph.compile()


def _after_writer(state: State) -> str:
    return "fixer" if state["error"] else END


def _attempt(model: ChatOpenAI, messages: list[Message]) -> dict[str, Any]:
    """Call the model and run its query on the database."""
    sql = extract_sql(model.invoke(messages).text)
    return {"sql": sql, "error": database.failure(sql)}
