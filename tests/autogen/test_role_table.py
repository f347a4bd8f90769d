"""The role in each way to build an agent with AutoGen, as the table of docs/02 states it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autogen_agentchat.agents import CodeExecutorAgent, MessageFilterAgent, MessageFilterConfig, SocietyOfMindAgent
from autogen_agentchat.messages import TextMessage
from autogen_agentchat.teams import (
    DiGraphBuilder,
    GraphFlow,
    MagenticOneGroupChat,
    RoundRobinGroupChat,
    SelectorGroupChat,
    Swarm,
)
from autogen_agentchat.tools import AgentTool, TeamTool
from autogen_core import AgentId, CancellationToken, MessageContext, RoutedAgent, SingleThreadedAgentRuntime, rpc
from autogen_core.models import UserMessage
from autogen_ext.code_executors.local import LocalCommandLineCodeExecutor

from tests.autogen.scripted import agent, calls, says
from tests.autogen.span_tree import attributes
from tests.autogen.test_team_kinds import ledger
from tests.role_table import roles_in_order, table


@dataclass
class Question:
    text: str


class Clerk(RoutedAgent):
    @rpc
    async def answer(self, message: Question, ctx: MessageContext) -> Question:
        await says("Seven.").create([UserMessage(content=message.text, source="user")])
        return message


class CoreAgent:
    """A core agent of type `clerk` on a runtime of its own."""

    async def run(self, task: str) -> None:
        runtime = SingleThreadedAgentRuntime()
        await Clerk.register(runtime, "clerk", lambda: Clerk("a clerk"))
        runtime.start()
        await runtime.send_message(Question(task), AgentId("clerk", "default"))
        await runtime.stop()


class Direct:
    """An agent whose `on_messages` the user calls."""

    async def run(self, task: str) -> None:
        message = TextMessage(content=task, source="user")
        await agent("planner", "7").on_messages([message], CancellationToken())


def society() -> SocietyOfMindAgent:
    return SocietyOfMindAgent("society", RoundRobinGroupChat([agent("writer", "1")], max_turns=1), says("Seven."))


def flow() -> GraphFlow:
    writer, critic = agent("writer", "1"), agent("critic", "2")
    builder = DiGraphBuilder().add_node(writer).add_node(critic).add_edge(writer, critic)
    return GraphFlow([writer, critic], builder.build())


def swarm() -> Swarm:
    planner = agent("planner", calls("transfer_to_executor"), handoffs=["executor"])
    return Swarm([planner, agent("executor", "7")], max_turns=2)


def with_tool(tool: AgentTool | TeamTool) -> Any:
    return agent("boss", calls(tool.name, task="Count."), tools=[tool])


WAYS: dict[str, Callable[[], Any]] = {
    "`AssistantAgent` `planner`": lambda: agent("planner", "7"),
    "`AssistantAgent` `planner`, called by `on_messages`": Direct,
    "`CodeExecutorAgent` `coder` with a model": lambda: CodeExecutorAgent(
        "coder", LocalCommandLineCodeExecutor(), model_client=says("No code."), sources=["user"]
    ),
    "`MessageFilterAgent` around `planner`": lambda: MessageFilterAgent(
        "filter", agent("planner", "7"), MessageFilterConfig(per_source=[])
    ),
    "core agent of type `clerk`": CoreAgent,
    "`RoundRobinGroupChat` of `writer` and `critic`": lambda: RoundRobinGroupChat(
        [agent("writer", "1"), agent("critic", "2")], max_turns=2
    ),
    "`SelectorGroupChat`, whose selector has a model": lambda: SelectorGroupChat(
        [agent("writer", "1"), agent("critic", "2")], says("writer", "critic"), max_turns=2
    ),
    "`MagenticOneGroupChat` of `executor` and `critic`": lambda: MagenticOneGroupChat(
        [agent("executor", "7"), agent("critic")],
        says("facts", "plan", ledger(done=False), ledger(done=True), "Seven mugs."),
    ),
    "`Swarm` of `planner` and `executor`": swarm,
    "`GraphFlow` of `writer` and `critic`": flow,
    "`RoundRobinGroupChat` of an inner team of `writer`, and `critic`": lambda: RoundRobinGroupChat(
        [RoundRobinGroupChat([agent("writer", "1")], name="inner", max_turns=1), agent("critic", "2")], max_turns=2
    ),
    "`SocietyOfMindAgent` `society` of `writer`": society,
    "`AgentTool` of `critic` in `boss`": lambda: with_tool(AgentTool(agent("critic", "7"))),
    "`TeamTool` of `critic` in `boss`": lambda: with_tool(
        TeamTool(RoundRobinGroupChat([agent("critic", "7")], max_turns=1), "team", "Asks the team.")
    ),
}
"""Each way to build an agent."""


async def test_the_table_states_the_role_in_each_way(spans: Any) -> None:
    made = {}
    for way, make in WAYS.items():
        spans.clear()
        await make().run(task="How many mugs?")
        finished = sorted(spans.get_finished_spans(), key=lambda span: span.start_time or 0)
        made[way] = roles_in_order(
            [attributes(span).get("agl.role") for span in finished if span.name.startswith("chat")]
        )

    assert made == table("built with AutoGen")
