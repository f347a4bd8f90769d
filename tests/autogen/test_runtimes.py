"""Runtimes that the user starts: in the same rollout as the team's run, and across processes over gRPC."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core import (
    AgentId,
    MessageContext,
    RoutedAgent,
    SingleThreadedAgentRuntime,
    TopicId,
    TypeSubscription,
    event,
    rpc,
    try_get_known_serializers_for_type,
)
from autogen_core.models import UserMessage
from autogen_ext.runtimes.grpc import GrpcWorkerAgentRuntime, GrpcWorkerAgentRuntimeHost

import agl
from tests.autogen.scripted import agent, says
from tests.autogen.span_tree import attributes, only, tree
from tests.ports import free_port
from tests.waiting import wait_until


async def test_turns_are_below_the_run_if_the_runtime_was_started_in_the_same_rollout(spans: Any) -> None:
    runtime = SingleThreadedAgentRuntime()
    teams = [RoundRobinGroupChat([agent(name, "7")], max_turns=1, name=name, runtime=runtime) for name in "ab"]
    spans.clear()
    async with agl.rollout("r1"):
        runtime.start()
        await teams[0].run(task="How many mugs?")
        async with agl.role("critic"):
            await teams[1].run(task="How many mugs?")
        await runtime.stop()

    assert tree(spans.get_finished_spans()).splitlines() == [
        "agl.rollout",
        "  invoke_workflow a",
        "    invoke_agent a [a]",
        "      chat [a]",
        "  invoke_workflow b [critic]",
        "    invoke_agent b [critic]",
        "      chat [critic]",
    ]


@dataclass
class Question:
    text: str


class Worker(RoutedAgent):
    @rpc
    async def on_call(self, message: Question, ctx: MessageContext) -> Question:
        await ask(message)
        return message

    @event
    async def on_event(self, message: Question, ctx: MessageContext) -> None:
        await ask(message)


async def ask(message: Question) -> None:
    await says("Seven.").create([UserMessage(content=message.text, source="user")])


@pytest.fixture
async def runtimes() -> AsyncIterator[list[GrpcWorkerAgentRuntime]]:
    """Two runtimes of a host; the second one has an agent of type `worker`."""
    address = f"127.0.0.1:{free_port()}"
    host = GrpcWorkerAgentRuntimeHost(address)
    host.start()
    started = [GrpcWorkerAgentRuntime(address), GrpcWorkerAgentRuntime(address)]
    for runtime in started:
        runtime.add_message_serializer(try_get_known_serializers_for_type(Question))
        await runtime.start()
    await Worker.register(started[1], "worker", lambda: Worker("works"))
    await started[1].add_subscription(TypeSubscription("news", "worker"))
    yield started
    for runtime in started:
        await runtime.stop()
    await host.stop()


@pytest.mark.parametrize("kind", ["call", "event"])
async def test_a_message_over_grpc_carries_the_rollout(
    spans: Any, runtimes: list[GrpcWorkerAgentRuntime], kind: str
) -> None:
    spans.clear()
    async with agl.rollout("r1", group_id="g1"):
        if kind == "call":
            await runtimes[0].send_message(Question("x"), AgentId("worker", "k"))
        else:
            await runtimes[0].publish_message(Question("x"), TopicId("news", "k"))
    await asyncio.to_thread(wait_until, lambda: len(spans.get_finished_spans()) == 3)

    finished = spans.get_finished_spans()
    assert tree(finished).splitlines() == ["agl.rollout", "  invoke_agent worker [worker]", "    chat [worker]"]
    chat = attributes(only(finished, "chat"))
    assert (chat["agl.rollout.id"], chat["agl.group.id"]) == ("r1", "g1")


async def test_a_message_over_grpc_outside_of_a_rollout_is_in_none(
    spans: Any, runtimes: list[GrpcWorkerAgentRuntime]
) -> None:
    spans.clear()
    await runtimes[0].send_message(Question("x"), AgentId("worker", "k"))

    assert "agl.rollout.id" not in attributes(only(spans.get_finished_spans(), "chat"))
