"""Turns outside of a team, and the precedence of roles."""

from typing import Any

import pytest
from autogen_agentchat.agents import BaseChatAgent, SocietyOfMindAgent
from autogen_agentchat.base import Response
from autogen_agentchat.messages import TextMessage
from autogen_agentchat.teams import RoundRobinGroupChat, Swarm
from autogen_core import CancellationToken

import agl
from tests.autogen.conftest import SwitchOn
from tests.autogen.scripted import agent, calls, says
from tests.autogen.span_tree import attributes, only, tree

TASK = [TextMessage(content="How many mugs?", source="user")]


async def stock(item: str) -> str:
    """Number of items in stock."""
    return f"7 x {item}"


async def ask(asked: Any, *, stream: bool) -> Response:
    """Call an agent's `on_messages` directly, without `run`."""
    if not stream:
        return await asked.on_messages(TASK, CancellationToken())
    items = [item async for item in asked.on_messages_stream(TASK, CancellationToken())]
    assert isinstance(items[-1], Response)
    return items[-1]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_agent_called_directly_has_a_turn_and_a_role(spans, stream):
    executor = agent("executor", calls("stock", item="mug"), "Seven.", tools=[stock], reflect_on_tool_use=True)
    spans.clear()
    assert (await ask(executor, stream=stream)).chat_message.to_text() == "Seven."
    assert tree(spans.get_finished_spans()).splitlines() == [
        "invoke_agent executor [executor]",
        "  chat [executor]",
        "  execute_tool stock [executor]",
        "  chat [executor]",
    ]
    turn = attributes(only(spans.get_finished_spans(), "invoke_agent executor"))
    assert (turn["gen_ai.operation.name"], turn["gen_ai.agent.name"]) == ("invoke_agent", "executor")
    assert turn["gen_ai.agent.description"] == "the executor"


async def test_a_society_called_directly_is_one_trace(spans):
    society = SocietyOfMindAgent("society", RoundRobinGroupChat([agent("writer", "1")], max_turns=1), says("Seven."))
    spans.clear()
    await ask(society, stream=False)
    assert tree(spans.get_finished_spans()).splitlines() == [
        "invoke_agent society [society]",
        "  invoke_workflow RoundRobinGroupChat [society]",
        "    invoke_agent writer [writer]",
        "      chat [writer]",
        "  chat [society]",
    ]


class Relay(BaseChatAgent):
    """An agent that calls another one directly."""

    def __init__(self, name: str, other: BaseChatAgent) -> None:
        super().__init__(name, "passes on")
        self._other = other

    @property
    def produced_message_types(self) -> list[type[TextMessage]]:
        return [TextMessage]

    async def on_messages(self, messages: Any, cancellation_token: CancellationToken) -> Response:
        return await self._other.on_messages(messages, cancellation_token)

    async def on_reset(self, cancellation_token: CancellationToken) -> None:
        await self._other.on_reset(cancellation_token)


async def test_an_agent_called_by_a_custom_agent_has_its_own_role(spans):
    relay = Relay("relay", agent("writer", "1"))
    spans.clear()
    await relay.run(task="How many mugs?")
    assert tree(spans.get_finished_spans()).splitlines() == [
        "invoke_agent relay [relay]",
        "  invoke_agent writer [writer]",
        "    chat [writer]",
    ]


async def test_agl_role_overrides_the_mapping_and_the_mapping_the_name(spans, switch_on: SwitchOn):
    switch_on(roles={"thinker": "plan.*"})
    planner, executor = agent("planner", "1", "2"), agent("executor", "1", "2")
    spans.clear()
    await RoundRobinGroupChat([planner, executor], max_turns=2).run(task="x")
    with agl.role("stated"):
        await RoundRobinGroupChat([planner, executor], max_turns=2).run(task="x")
    names = ("planner", "executor", "planner", "executor")
    roles = ("thinker", "executor", "stated", "stated")
    chats = [attributes(span) for span in spans.get_finished_spans() if span.name == "chat"]
    assert [(chat["gen_ai.agent.name"], chat["agl.role"]) for chat in chats] == list(zip(names, roles, strict=True))


async def test_a_role_set_inside_a_turn_applies_to_nested_agents(spans):
    helper = agent("helper", "7", "8")

    async def count(item: str) -> str:
        """Count items."""
        with agl.role("executor"):  # equal to the current agent's name
            await helper.run(task=item)
        return (await helper.run(task=item)).messages[-1].to_text()  # type: ignore[union-attr]

    executor = agent("executor", calls("count", item="mug"), tools=[count])
    spans.clear()
    await executor.run(task="How many mugs?")
    assert tree(spans.get_finished_spans()).splitlines() == [
        "invoke_agent executor [executor]",
        "  chat [executor]",
        "  execute_tool count [executor]",
        "    invoke_agent helper [executor]",
        "      chat [executor]",
        "    invoke_agent helper [helper]",
        "      chat [helper]",
    ]


async def test_a_hand_off_inside_agl_role_has_the_role_of_its_calls(spans):
    planner = agent("planner", calls("transfer_to_executor"), handoffs=["executor"])
    team = Swarm([planner, agent("executor", "7")], max_turns=2)
    spans.clear()
    with agl.role("stated"):
        await team.run(task="How many mugs?")
    handoff = attributes(only(spans.get_finished_spans(), "agl.handoff"))
    assert (handoff["agl.handoff.source"], handoff["agl.handoff.target"]) == ("stated", "stated")
