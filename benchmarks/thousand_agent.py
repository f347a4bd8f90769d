"""The agent of `benchmarks.thousand`: a LangGraph graph whose nodes `planner` and `executor` take turns.

Each node makes a call. Call `turn` of the task `{"first": n, "turns": t, "mean_s": m}` asks the null engine for the
answer `n + turn`, after a delay from the exponential distribution with mean m.
"""

import os
import random
from functools import lru_cache
from typing import Any, TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph

from benchmarks.null_engine import wish

ROLES = ("planner", "executor")


class State(TypedDict):
    """State that the nodes pass on."""

    task: dict[str, Any]
    turn: int
    answer: str


def run(task: dict[str, Any]) -> str:
    """The last answer."""
    state = {"task": task, "turn": 0, "answer": ""}
    return _graph().invoke(state, {"recursion_limit": task["turns"] + 2})["answer"]


@lru_cache(maxsize=1)
def _graph() -> CompiledStateGraph:
    graph = StateGraph(State)
    for name in ROLES:
        graph.add_node(name, _node(ChatOpenAI(model=name, base_url=os.environ["OPENAI_BASE_URL"])))
        graph.add_conditional_edges(name, _next, [*ROLES, END])
    graph.add_edge(START, ROLES[0])
    return graph.compile()


def _node(model: ChatOpenAI) -> Any:
    def call(state: State) -> dict[str, Any]:
        number = state["task"]["first"] + state["turn"]
        delay_ms = round(1000 * random.Random(number).expovariate(1 / state["task"]["mean_s"]))
        return {"turn": state["turn"] + 1, "answer": model.invoke(wish(number, delay_ms)).text}

    return call


def _next(state: State) -> str:
    return END if state["turn"] == state["task"]["turns"] else ROLES[state["turn"] % len(ROLES)]
