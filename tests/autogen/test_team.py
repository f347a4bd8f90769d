"""Teams: one trace per run, roles, hand-offs, headers, errors, concurrency."""

import asyncio
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.conditions import MaxMessageTermination, TextMentionTermination
from autogen_agentchat.teams import RoundRobinGroupChat, Swarm
from autogen_core import SingleThreadedAgentRuntime
from autogen_core.tools import FunctionTool

import agl
from tests.autogen.conftest import SwitchOn
from tests.autogen.span_tree import attributes, named, only, tree


async def stock(item: str) -> str:
    """Number of items in stock."""
    return f"7 x {item}"


async def broken_stock(item: str) -> str:
    """Number of items in stock."""
    raise ValueError(f"no shelf for {item}")


def round_robin(client: Any, *, stream: bool = False, tool: Any = stock, **options: Any) -> RoundRobinGroupChat:
    planner = AssistantAgent("planner", client("planner", **options), model_client_stream=stream)
    executor = AssistantAgent(
        "executor",
        client("executor", **options),
        tools=[FunctionTool(tool, description="Number of items in stock.", name="stock")],
        reflect_on_tool_use=True,
        model_client_stream=stream,
    )
    return RoundRobinGroupChat([planner, executor], termination_condition=MaxMessageTermination(3))


def swarm(client: Any) -> Swarm:
    planner = AssistantAgent("planner", client("planner"), handoffs=["executor"])
    executor = AssistantAgent("executor", client("executor"))
    return Swarm([planner, executor], termination_condition=TextMentionTermination("TERMINATE"))


ROUND_ROBIN = """\
invoke_workflow RoundRobinGroupChat
  invoke_agent planner [planner]
    chat planner [planner]
  invoke_agent executor [executor]
    chat executor [executor]
    execute_tool stock [executor]
    chat executor [executor]"""


@pytest.mark.parametrize("stream", [False, True])
async def test_without_an_outer_span_one_run_is_one_trace_and_not_sixteen(spans, client, stream):
    team = round_robin(client, stream=stream)
    spans.clear()  # create_agent spans have no parent: agents are created before the run

    await team.run(task="How many mugs?")

    finished = spans.get_finished_spans()
    assert tree(finished) == ROUND_ROBIN
    assert len({span.context.trace_id for span in finished}) == 1
    root = only(finished, "invoke_workflow RoundRobinGroupChat")
    assert attributes(root) == {
        "gen_ai.operation.name": "invoke_workflow",
        "gen_ai.workflow.name": "RoundRobinGroupChat",
    }
    assert root.instrumentation_scope.name == "agl_autogen"


async def test_a_run_with_spans_of_the_message_bus_is_one_trace(spans, client, switch_on):
    switch_on(message_bus=True)
    team = round_robin(client)
    spans.clear()

    await team.run(task="How many mugs?")

    finished = spans.get_finished_spans()
    assert len(finished) > 20
    assert len({span.context.trace_id for span in finished}) == 1
    assert [attributes(span)["agl.role"] for span in named(finished, "chat executor")] == ["executor", "executor"]


async def test_a_handoff_is_a_span_between_the_turns(spans, client):
    team = swarm(client)
    spans.clear()

    await team.run(task="How many mugs?")

    finished = spans.get_finished_spans()
    assert tree(finished).splitlines() == [
        "invoke_workflow Swarm",
        "  invoke_agent planner [planner]",
        "    chat planner [planner]",
        "    execute_tool transfer_to_executor [planner]",
        "  agl.handoff",
        "  invoke_agent executor [executor]",
        "    chat executor [executor]",
    ]
    handoff = only(finished, "agl.handoff")
    assert attributes(handoff) == {"agl.handoff.source": "planner", "agl.handoff.target": "executor"}


async def test_a_handoff_in_an_inner_team_is_recorded_once(spans, client):
    inner = RoundRobinGroupChat(
        [AssistantAgent("planner", client("planner"), handoffs=["user"])],
        name="inner",
        max_turns=1,
    )
    outer = RoundRobinGroupChat([inner], name="outer", max_turns=1)
    spans.clear()

    await outer.run(task="How many mugs?")

    finished = spans.get_finished_spans()
    assert len({span.context.trace_id for span in finished}) == 1
    parent = only(finished, "agl.handoff").parent
    assert parent is not None and parent.span_id == only(finished, "invoke_workflow inner").context.span_id


@pytest.mark.parametrize("stream", [False, True])
async def test_every_request_carries_the_chat_span_and_the_rollout(spans, client, server, stream):
    team = round_robin(client, stream=stream)
    spans.clear()

    with agl.rollout("r1", group_id="g1", mode="eval"):
        await team.run(task="How many mugs?")

    chats = {span.context.span_id: span for span in spans.get_finished_spans() if span.name.startswith("chat ")}
    assert len(server.seen) == len(chats) == 3
    for seen in server.seen:
        _, trace_id, span_id, _ = seen.headers["traceparent"].split("-")
        span = chats[int(span_id, 16)]
        assert int(trace_id, 16) == span.context.trace_id
        assert attributes(span)["gen_ai.response.id"] == seen.response_id
        assert dict(entry.split("=") for entry in seen.headers["baggage"].split(",")) == {
            "agl.rollout.id": "r1",
            "agl.attempt.id": "r1-a1",
            "agl.group.id": "g1",
            "agl.mode": "eval",
            "agl.role": seen.body["model"],
            "agl.role.inferred": "true",
        }


async def test_teams_on_a_runtime_started_elsewhere_do_not_mix(spans, client, server):
    """The runtime's loop runs in the context in which it was started: here, in a rollout of no team."""
    runtime = SingleThreadedAgentRuntime()
    with agl.rollout("elsewhere"):
        runtime.start()

    async def one_rollout(name: str) -> None:
        agents = [AssistantAgent(f"{role}_{name}", client(role)) for role in ("planner", "executor")]
        with agl.rollout(name):
            await RoundRobinGroupChat([*agents], max_turns=2, runtime=runtime).run(task=f"task {name}")

    await asyncio.gather(one_rollout("r1"), one_rollout("r2"))
    await runtime.stop()

    assert len(server.seen) == 4
    for seen in server.seen:
        rollout = next(m["content"] for m in seen.body["messages"] if m["role"] == "user").removeprefix("task ")
        assert f"agl.rollout.id={rollout}," in seen.headers["baggage"]
    for root in named(spans.get_finished_spans(), "invoke_workflow RoundRobinGroupChat"):
        inside = [span for span in spans.get_finished_spans() if span.context.trace_id == root.context.trace_id]
        assert len([span for span in inside if span.name.startswith("chat ")]) == 2


async def test_a_failing_tool_marks_its_span_and_the_run_continues(spans, client):
    team = round_robin(client, tool=broken_stock)
    spans.clear()

    result = await team.run(task="How many mugs?")

    assert result.stop_reason is not None
    assert tree(spans.get_finished_spans()) == ROUND_ROBIN.replace("stock [executor]", "stock [executor] ERROR")
    tool = only(spans.get_finished_spans(), "execute_tool stock")
    assert attributes(tool)["error.type"] == "ValueError"


async def test_a_failing_model_call_is_an_error_on_the_agent_span_too_and_reaches_the_caller(spans, client):
    team = round_robin(client)
    spans.clear()

    with pytest.raises(RuntimeError, match="BadRequestError"):
        await team.run(task="FAIL")

    assert tree(spans.get_finished_spans()).splitlines() == [
        "invoke_workflow RoundRobinGroupChat ERROR",
        "  invoke_agent planner [planner] ERROR",
        "    chat planner [planner] ERROR",
    ]
    chat = only(spans.get_finished_spans(), "chat planner")
    assert attributes(chat)["error.type"] == "BadRequestError"
    assert [event.name for event in chat.events] == ["exception"]


async def test_roles_are_mapped(spans, switch_on: SwitchOn, client):
    switch_on(roles={"thinker": "plan.*|critic"})
    team = swarm(client)
    spans.clear()

    await team.run(task="How many mugs?")

    chat = attributes(only(spans.get_finished_spans(), "chat planner"))
    assert (chat["agl.role"], chat["gen_ai.agent.name"]) == ("thinker", "planner")
    assert attributes(only(spans.get_finished_spans(), "agl.handoff"))["agl.handoff.source"] == "thinker"


async def test_an_agent_without_a_team_has_no_workflow_span(spans, client):
    agent = AssistantAgent("solo", client("solo"))
    spans.clear()

    await agent.run(task="Hello")
    async for _ in agent.run_stream(task="Hello"):
        pass

    run = ["invoke_agent solo [solo]", "  chat solo [solo]"]
    assert tree(spans.get_finished_spans()).splitlines() == run * 2


async def test_a_suppressed_run_makes_no_span_of_ours(spans, client, server):
    from opentelemetry.instrumentation.utils import suppress_instrumentation

    team = round_robin(client)
    spans.clear()
    with suppress_instrumentation():
        await team.run(task="How many mugs?")

    scopes = {span.instrumentation_scope.name for span in spans.get_finished_spans()}
    assert "agl_autogen" not in scopes
    assert "traceparent" not in server.seen[0].headers
