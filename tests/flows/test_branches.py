"""Credit of calls in parallel branches of real frameworks: it does not depend on which branch happens to be faster."""

import asyncio
import operator
from typing import Annotated, Any, TypedDict

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.teams import DiGraphBuilder, GraphFlow
from autogen_core.models import CreateResult
from autogen_ext.models.replay import ReplayChatCompletionClient
from langchain_core.language_models import FakeListChatModel
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import agl
from agl.otlp import decode
from agl.trajectory import build_trajectory
from agl_autogen import AutoGenInstrumentor
from agl_langchain import LangChainInstrumentor
from agl_trainer.algo.credit import call_credits
from tests.autogen.conftest import MODEL_INFO
from tests.autogen.scripted import calls

MODEL = FakeListChatModel(responses=["Seven."])


def credits_by_role(memory: InMemorySpanExporter) -> dict[str, list[float]]:
    """Credits at gamma 0.5 of a reward of 1, in ascending order."""
    made = build_trajectory(decode(encode_spans(memory.get_finished_spans()).SerializeToString()))
    credits = call_credits(made, 0.5)
    found: dict[str, list[float]] = {}
    for call in made.calls:
        credit = credits[call.span_id]
        assert credit is not None
        found.setdefault(call.role, []).append(credit.total)
    return {role: sorted(values) for role, values in found.items()}


class Said(TypedDict, total=False):
    said: Annotated[list[str], operator.add]


class State(Said, total=False):
    delay: float


async def answer(state: State) -> Said:
    await asyncio.sleep(state.get("delay", 0.0))
    return {"said": [(await MODEL.ainvoke("How many?")).text]}


def in_order(*names: str) -> Any:
    graph = StateGraph(State, output_schema=Said)
    for before, name in zip([START, *names], names, strict=False):
        graph.add_node(name, answer)
        graph.add_edge(before, name)
    graph.add_edge(names[-1], END)
    return graph.compile()


@pytest.mark.parametrize("delays", [(0.03, 0.03), (0.03, 0.2), (0.2, 0.03)])
async def test_a_fan_out_with_send_of_langgraph(delays: tuple[float, ...], memory: InMemorySpanExporter) -> None:
    """The slower branch makes its calls between those of the faster one, or after all of them."""
    graph = StateGraph(State)
    graph.add_node("planner", answer)
    graph.add_node("worker", in_order("finder", "critic", "finder again"))
    graph.add_edge(START, "planner")
    graph.add_conditional_edges("planner", lambda _: [Send("worker", {"delay": delay}) for delay in delays], ["worker"])
    graph.add_edge("worker", END)
    instrumentor = LangChainInstrumentor()
    instrumentor.instrument(roles={"finder": "finder.*"})
    memory.clear()
    with agl.rollout("r1"):
        await graph.compile().ainvoke({})
        agl.emit_reward(1.0)
    instrumentor.uninstrument()
    assert credits_by_role(memory) == {
        "planner": [0.125],
        "finder": [0.25, 0.25, 1.0, 1.0],
        "critic": [0.5, 0.5],
    }


class SlowModel(ReplayChatCompletionClient):
    """Scripted answers that take a moment, so that the calls of parallel branches overlap."""

    async def create(self, *args: Any, **options: Any) -> CreateResult:
        await asyncio.sleep(0.03)
        return await super().create(*args, **options)


def scripted(name: str, *answers: str | CreateResult, **options: Any) -> AssistantAgent:
    model = SlowModel(list(answers), model_info=MODEL_INFO)
    return AssistantAgent(name, model, description=f"the {name}", **options)


async def wait(seconds: float) -> str:
    """Wait."""
    await asyncio.sleep(seconds)
    return "done"


@pytest.mark.parametrize("delays", [(0.0, 0.0), (0.0, 0.1), (0.1, 0.0)])
async def test_parallel_branches_of_a_graph_flow_of_autogen(
    delays: tuple[float, ...], memory: InMemorySpanExporter
) -> None:
    instrumentor = AutoGenInstrumentor()
    instrumentor.instrument()
    workers = [
        scripted(name, calls("wait", seconds=delay), "Seven.", tools=[wait], reflect_on_tool_use=True)
        for name, delay in zip(("finder", "critic"), delays, strict=True)
    ]
    planner, editor = scripted("planner", "Ask both."), scripted("editor", "Seven.")
    builder = DiGraphBuilder()
    for node in (planner, *workers, editor):
        builder.add_node(node)
    for worker in workers:
        builder.add_edge(planner, worker)
        builder.add_edge(worker, editor)
    memory.clear()
    with agl.rollout("r1"):
        await GraphFlow([planner, *workers, editor], builder.build()).run(task="How many?")
        agl.emit_reward(1.0)
    instrumentor.uninstrument()
    assert credits_by_role(memory) == {
        "planner": [0.25],
        "finder": [0.5, 0.5],
        "critic": [0.5, 0.5],
        "editor": [1.0],
    }
