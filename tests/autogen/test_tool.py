"""Tools: one span per call, AutoGen's own, as a child of its turn."""

import asyncio
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_agentchat.tools import AgentTool, TeamTool
from autogen_core import CancellationToken
from autogen_core.tools import FunctionTool, StaticStreamWorkbench, StaticWorkbench
from opentelemetry import trace

from tests.autogen.scripted import agent, calls
from tests.autogen.span_tree import attributes, named, only, tree


async def stock(item: str) -> str:
    """Number of items in stock."""
    with trace.get_tracer("user").start_as_current_span("look it up"):
        return f"7 x {item}"


async def price(item: str) -> str:
    """Price of an item."""
    return f"{item}: 3"


async def slow(item: str) -> str:
    """Never answers."""
    await asyncio.sleep(30)
    return item


async def lines_of(spans: Any, asked: AssistantAgent) -> list[str]:
    """The span tree of a run of `asked`."""
    spans.clear()
    await asked.run(task="How many mugs?")
    return tree(spans.get_finished_spans()).splitlines()


async def test_a_users_span_in_a_tool_belongs_to_the_trace(spans):
    assert await lines_of(spans, agent("executor", calls("stock", item="mug"), tools=[stock])) == [
        "invoke_agent executor [executor]",
        "  chat [executor]",
        "  execute_tool stock [executor]",
        "    look it up [executor]",
    ]


async def test_parallel_calls_are_siblings_with_their_own_ids(spans):
    executor = agent("executor", calls("price", "price", "price", item="mug"), tools=[price])
    assert await lines_of(spans, executor) == [
        "invoke_agent executor [executor]",
        "  chat [executor]",
        *["  execute_tool price [executor]"] * 3,
    ]
    tools = named(spans.get_finished_spans(), "execute_tool price")
    assert sorted(str(attributes(tool)["gen_ai.tool.call.id"]) for tool in tools) == ["c0", "c1", "c2"]
    assert {tool.instrumentation_scope.name for tool in tools} == {"autogen-core"}


@pytest.mark.parametrize("workbench_class", [StaticWorkbench, StaticStreamWorkbench])
async def test_a_tool_of_a_workbench_has_one_span(spans, workbench_class):
    workbench = workbench_class([FunctionTool(price, description="Price of an item.")])
    assert await lines_of(spans, agent("executor", calls("price", item="mug"), workbench=workbench)) == [
        "invoke_agent executor [executor]",
        "  chat [executor]",
        "  execute_tool price [executor]",
    ]


@pytest.mark.parametrize("kind", [AgentTool, TeamTool])
async def test_an_agent_or_team_as_a_tool_is_a_child_of_the_tool_in_its_own_role(spans, kind):
    writer = agent("writer", "7")
    team = RoundRobinGroupChat([writer], max_turns=1)
    tool = AgentTool(writer) if kind is AgentTool else TeamTool(team, name="writer", description="writes")
    lines = await lines_of(spans, agent("executor", calls("writer", task="count"), tools=[tool]))
    assert lines[:3] == [
        "invoke_agent executor [executor]",
        "  chat [executor]",
        "  execute_tool writer [executor]",
    ]
    assert [line.strip() for line in lines[-2:]] == ["invoke_agent writer [writer]", "chat [writer]"]
    assert len(lines) == (5 if kind is AgentTool else 6)
    assert len({span.context.trace_id for span in spans.get_finished_spans()}) == 1


async def fails(item: str) -> str:
    """Fails."""
    raise ValueError(f"no shelf for {item}")


async def test_a_failing_tool_is_recorded_once_on_its_span(spans):
    await lines_of(spans, agent("executor", calls("fails", item="mug"), tools=[fails]))
    tool = only(spans.get_finished_spans(), "execute_tool fails")
    assert (tool.status.status_code.name, tool.status.description) == ("ERROR", "ValueError: no shelf for mug")
    assert attributes(tool)["error.type"] == "ValueError"
    assert [event.name for event in tool.events] == ["exception"]


@pytest.mark.parametrize("in_team", [False, True])
async def test_a_cancelled_run_ends_every_span_with_an_error(spans, client, server, in_team):
    solo = AssistantAgent("solo", client("solo"))
    runner = RoundRobinGroupChat([solo]) if in_team else solo
    spans.clear()
    token = CancellationToken()
    run = asyncio.ensure_future(runner.run(task="SLOW", cancellation_token=token))
    async with asyncio.timeout(5):
        while not server.seen:
            await asyncio.sleep(0.01)
        token.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run

    finished = spans.get_finished_spans()
    assert [span.status.status_code.name for span in finished] == ["ERROR"] * (3 if in_team else 2)
    assert {attributes(span)["error.type"] for span in finished} == {"CancelledError"}


async def test_a_tool_whose_task_is_cancelled_ends_with_an_error(spans):
    """AutoGen itself ends the tool's span without an error."""
    run = asyncio.ensure_future(FunctionTool(slow, description="").run_json({"item": "mug"}, CancellationToken()))
    await asyncio.sleep(0.01)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    tool = only(spans.get_finished_spans(), "execute_tool slow")
    assert (tool.status.status_code.name, attributes(tool)["error.type"]) == ("ERROR", "CancelledError")


async def test_a_restored_team_continues_in_a_second_run_of_one_trace(spans):
    def team() -> RoundRobinGroupChat:
        return RoundRobinGroupChat([agent("planner", "1"), agent("executor", "2")], max_turns=1)

    first, second = team(), team()
    spans.clear()
    await first.run(task="How many mugs?")
    await second.load_state(await first.save_state())
    await second.run()

    assert tree(spans.get_finished_spans()).splitlines() == [
        "invoke_workflow RoundRobinGroupChat",
        "  invoke_agent planner [planner]",
        "    chat [planner]",
        "invoke_workflow RoundRobinGroupChat",
        "  invoke_agent executor [executor]",
        "    chat [executor]",
    ]
