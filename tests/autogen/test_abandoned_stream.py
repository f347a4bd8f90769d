"""Abandoned streams: no span stays current in the caller's task, and every span ends."""

import asyncio
import gc
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.base import TaskResult
from autogen_agentchat.messages import ModelClientStreamingChunkEvent, TextMessage
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core import CancellationToken
from autogen_core.models import CreateResult, UserMessage
from opentelemetry import trace

import agl
from tests.autogen.span_tree import attributes, only, tree

ASK = [UserMessage(content="How many mugs?", source="user")]


async def break_off(stream: Any) -> None:
    """Read up to the first text chunk, then drop the stream without closing it."""
    async for item in stream:
        if isinstance(item, str | ModelClientStreamingChunkEvent):
            break


async def all_ended(spans: Any, count: int) -> None:
    gc.collect()
    async with asyncio.timeout(5):
        while len(spans.get_finished_spans()) < count:
            await asyncio.sleep(0.01)


def assert_nothing_left(caplog: pytest.LogCaptureFixture) -> None:
    assert trace.get_current_span() is trace.INVALID_SPAN
    assert agl.current_role() is None
    assert "Failed to detach context" not in caplog.text


async def test_an_abandoned_model_stream_ends_its_span(spans, client, caplog):
    await break_off(client("planner").create_stream(ASK))
    await all_ended(spans, 1)
    assert_nothing_left(caplog)
    span = only(spans.get_finished_spans(), "chat planner")
    assert span.status.status_code.name == "ERROR"
    assert span.status.description == "the caller closed the stream before its end"
    assert attributes(span)["error.type"] == "abandoned"
    assert attributes(span)["gen_ai.response.id"] == "chatcmpl-0"


async def test_an_abandoned_agent_stream_logs_no_failed_detach_and_leaves_no_span_current(spans, client, caplog):
    agent = AssistantAgent("solo", client("solo"), model_client_stream=True)
    spans.clear()
    await break_off(agent.run_stream(task="How many mugs?"))
    await all_ended(spans, 2)
    assert_nothing_left(caplog)
    assert tree(spans.get_finished_spans()).splitlines() == ["invoke_agent solo [solo]", "  chat solo [solo] ERROR"]


async def test_an_abandoned_stream_of_an_agent_called_directly_leaves_no_span_current(spans, client, caplog):
    agent = AssistantAgent("solo", client("solo"), model_client_stream=True)
    spans.clear()
    await break_off(agent.on_messages_stream([TextMessage(content="How many?", source="user")], CancellationToken()))
    await all_ended(spans, 2)
    assert_nothing_left(caplog)
    assert tree(spans.get_finished_spans()).splitlines() == ["invoke_agent solo [solo]", "  chat solo [solo] ERROR"]


async def test_an_abandoned_team_stream_leaves_no_span_current_and_continues_in_its_trace(spans, client, caplog):
    """AutoGen completes an abandoned run in the background; its spans stay in the run's trace."""
    agents = [AssistantAgent(name, client(name), model_client_stream=True) for name in ("planner", "executor")]
    team = RoundRobinGroupChat([*agents], max_turns=2)
    spans.clear()
    await break_off(team.run_stream(task="How many mugs?"))
    await all_ended(spans, 5)
    assert_nothing_left(caplog)
    assert tree(spans.get_finished_spans()).splitlines() == [
        "invoke_workflow RoundRobinGroupChat ERROR",
        "  invoke_agent planner [planner]",
        "    chat planner [planner]",
        "  invoke_agent executor [executor]",
        "    chat executor [executor]",
    ]


async def test_a_stream_closed_by_its_reader_ends_at_once(spans, client, caplog):
    stream = client("planner").create_stream(ASK)
    await anext(stream)
    await stream.aclose()
    assert_nothing_left(caplog)
    assert only(spans.get_finished_spans(), "chat planner").status.status_code.name == "ERROR"


async def test_a_stream_closed_after_its_result_is_not_abandoned(spans, client, caplog):
    team = RoundRobinGroupChat([AssistantAgent("solo", client("solo"), model_client_stream=True)], max_turns=1)
    spans.clear()
    async for item in client("planner").create_stream(ASK):
        if isinstance(item, CreateResult):
            break
    async for item in team.run_stream(task="How many mugs?"):
        if isinstance(item, TaskResult):
            break
    await all_ended(spans, 4)
    assert_nothing_left(caplog)
    assert [span.name for span in spans.get_finished_spans() if not span.status.is_unset] == []


async def test_a_timeout_around_a_stream_still_works(spans, client):
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            async for _ in client("planner").create_stream([UserMessage(content="SLOW", source="user")]):
                pass
    assert attributes(only(spans.get_finished_spans(), "chat planner"))["error.type"] == "CancelledError"
