"""Every kind of team: one trace per run, turns below the team, and roles on the team's own model calls."""

import json
from typing import Any

import pytest
from autogen_agentchat.agents import SocietyOfMindAgent
from autogen_agentchat.teams import (
    DiGraphBuilder,
    GraphFlow,
    MagenticOneGroupChat,
    RoundRobinGroupChat,
    SelectorGroupChat,
)

from tests.autogen.scripted import agent, says
from tests.autogen.span_tree import attributes, named, tree


async def lines_of(spans: Any, team: Any) -> list[str]:
    """The tree of a run of `team`; checks that it is one trace."""
    spans.clear()
    await team.run(task="How many mugs?")
    finished = spans.get_finished_spans()
    assert len({span.context.trace_id for span in finished}) == 1
    return tree(finished).splitlines()


@pytest.mark.parametrize("stream", [False, True])
async def test_the_manager_of_a_selector_team_has_its_own_role(spans, stream):
    participants = [agent("planner", "7"), agent("executor", "7")]
    manager = says("executor", "planner")
    team = SelectorGroupChat([*participants], manager, max_turns=2, model_client_streaming=stream)
    assert await lines_of(spans, team) == [
        "invoke_workflow SelectorGroupChat",
        "  chat [SelectorGroupChatManager]",
        "  invoke_agent executor [executor]",
        "    chat [executor]",
        "  invoke_agent planner [planner]",
        "    chat [planner]",
    ]
    first = named(spans.get_finished_spans(), "chat")[0]
    assert attributes(first)["gen_ai.agent.name"] == "SelectorGroupChatManager"


def ledger(*, done: bool) -> str:
    """The JSON that MagenticOne's orchestrator requests from its model before every step."""
    answers: dict[str, Any] = {
        "is_request_satisfied": done,
        "is_progress_being_made": True,
        "is_in_loop": False,
        "instruction_or_question": "Look it up.",
        "next_speaker": "executor",
    }
    return json.dumps({name: {"reason": "so", "answer": answer} for name, answer in answers.items()})


async def test_the_orchestrator_of_magentic_one_has_its_own_role(spans):
    orchestrator = says("facts", "plan", ledger(done=False), ledger(done=True), "Seven mugs.")
    assert await lines_of(spans, MagenticOneGroupChat([agent("executor", "7"), agent("critic")], orchestrator)) == [
        "invoke_workflow MagenticOneGroupChat",
        "  chat [MagenticOneOrchestrator]",
        "  chat [MagenticOneOrchestrator]",
        "  chat [MagenticOneOrchestrator]",
        "  invoke_agent executor [executor]",
        "    chat [executor]",
        "  chat [MagenticOneOrchestrator]",
        "  chat [MagenticOneOrchestrator]",
    ]


async def test_branches_of_a_graph_are_sibling_turns(spans):
    writer, critic, editor = agent("writer", "1"), agent("critic", "2"), agent("editor", "3")
    builder = DiGraphBuilder()
    for node in (writer, critic, editor):
        builder.add_node(node)
    builder.add_edge(writer, critic)
    builder.add_edge(writer, editor)
    assert await lines_of(spans, GraphFlow([writer, critic, editor], builder.build())) == [
        "invoke_workflow GraphFlow",
        "  invoke_agent writer [writer]",
        "    chat [writer]",
        "  invoke_agent critic [critic]",
        "    chat [critic]",
        "  invoke_agent editor [editor]",
        "    chat [editor]",
    ]


async def test_a_nested_team_is_a_child_of_the_outer_team(spans):
    inner = RoundRobinGroupChat([agent("writer", "1")], name="inner", max_turns=1)
    outer = RoundRobinGroupChat([inner, agent("critic", "2")], name="outer", max_turns=2)
    assert await lines_of(spans, outer) == [
        "invoke_workflow outer",
        "  invoke_workflow inner",
        "    invoke_agent writer [writer]",
        "      chat [writer]",
        "  invoke_agent critic [critic]",
        "    chat [critic]",
    ]


async def test_a_society_of_mind_and_its_members_have_their_own_roles(spans):
    inner = RoundRobinGroupChat([agent("writer", "1"), agent("editor", "2")], name="inner", max_turns=2)
    society = SocietyOfMindAgent("society", inner, says("Seven."))
    assert await lines_of(spans, RoundRobinGroupChat([society, agent("critic", "3")], max_turns=2)) == [
        "invoke_workflow RoundRobinGroupChat",
        "  invoke_agent society [society]",
        "    invoke_workflow inner [society]",
        "      invoke_agent writer [writer]",
        "        chat [writer]",
        "      invoke_agent editor [editor]",
        "        chat [editor]",
        "    chat [society]",
        "  invoke_agent critic [critic]",
        "    chat [critic]",
    ]
