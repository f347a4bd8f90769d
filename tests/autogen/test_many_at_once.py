"""Many concurrent runs: every span has the right parent and rollout, and no run stays registered."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.teams import RoundRobinGroupChat
from opentelemetry.sdk.trace import ReadableSpan

import agl
from agl_autogen import _team_run
from tests.autogen.scripted import agent, calls
from tests.autogen.span_tree import attributes, tree


async def stock(item: str) -> str:
    """Number of items in stock."""
    await asyncio.sleep(0)
    return f"7 x {item}"


async def in_rollouts(count: int, run: Callable[[int], Awaitable[object]]) -> None:
    """Run `run(number)` in rollout `r<number>`, concurrently for all numbers."""

    async def one(number: int) -> None:
        with agl.rollout(f"r{number}"):
            await run(number)

    await asyncio.gather(*[one(number) for number in range(count)])


def by_rollout(spans: Iterable[ReadableSpan]) -> dict[object, list[ReadableSpan]]:
    found: dict[object, list[ReadableSpan]] = defaultdict(list)
    for span in spans:
        found[attributes(span)["agl.rollout.id"]].append(span)
    return found


SOLO = """\
agl.rollout
  invoke_agent executor [executor]
    chat [executor]
    execute_tool stock [executor]
    chat [executor]"""

TEAM = """\
agl.rollout
  invoke_workflow RoundRobinGroupChat
    invoke_agent planner [planner]
      chat planner [planner]
    invoke_agent executor [executor]
      chat executor [executor]
      execute_tool stock [executor]
      chat executor [executor]"""


@pytest.mark.parametrize("stream", [False, True])
async def test_two_hundred_concurrent_agents_do_not_mix(spans, caplog, stream):
    options = {"tools": [stock], "reflect_on_tool_use": True, "model_client_stream": stream}
    agents = [agent("executor", calls("stock", item="mug"), "Seven.", **options) for _ in range(200)]
    spans.clear()

    await in_rollouts(200, lambda number: agents[number].run(task=f"task {number}"))

    rollouts = by_rollout(spans.get_finished_spans())
    assert len(rollouts) == 200
    for rollout, inside in rollouts.items():
        assert tree(inside) == SOLO
        asked = str(attributes(next(span for span in inside if span.name == "chat"))["gen_ai.input.messages"])
        assert f'"task {str(rollout).removeprefix("r")}"' in asked
    assert "Failed to detach context" not in caplog.text


async def test_twenty_concurrent_teams_do_not_mix(spans, client, server, caplog):
    def team(stream: bool) -> RoundRobinGroupChat:
        options = {"model_client_stream": stream}
        planner = AssistantAgent("planner", client("planner"), **options)
        executor = AssistantAgent("executor", client("executor"), tools=[stock], reflect_on_tool_use=True, **options)
        return RoundRobinGroupChat([planner, executor], max_turns=2)

    teams = [team(stream=number % 2 == 0) for number in range(20)]
    spans.clear()

    await in_rollouts(20, lambda number: teams[number].run(task=f"task r{number}"))

    assert [tree(inside) for inside in by_rollout(spans.get_finished_spans()).values()] == [TEAM] * 20
    assert len(server.seen) == 60
    for seen in server.seen:
        rollout = next(m["content"] for m in seen.body["messages"] if m["role"] == "user").removeprefix("task ")
        assert f"agl.rollout.id={rollout}," in seen.headers["baggage"]
    assert _team_run._RUNNING == {}
    assert "Failed to detach context" not in caplog.text
