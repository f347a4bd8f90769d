"""Core agents: each message that one handles is a turn, a child of the sender's turn."""

import asyncio
import subprocess
import sys
from dataclasses import dataclass

import pytest
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core import (
    AgentId,
    MessageContext,
    RoutedAgent,
    SingleThreadedAgentRuntime,
    TopicId,
    TypeSubscription,
    message_handler,
)
from autogen_core.models import ChatCompletionClient, UserMessage

import agl
from tests.autogen.scripted import agent, says
from tests.autogen.span_tree import attributes, named, only, tree


@dataclass
class Question:
    text: str


@dataclass
class Note:
    text: str


class Asker(RoutedAgent):
    """Calls its model, then sends the response to the next agent, if it has one."""

    def __init__(self, client: ChatCompletionClient, next_agent: str | None = None) -> None:
        super().__init__("asks its model")
        self._client = client
        self._next = next_agent

    @message_handler
    async def on_question(self, message: Question, ctx: MessageContext) -> Note:
        if message.text == "FAIL":
            raise ValueError("no such question")
        answer = await self._client.create([UserMessage(content=message.text, source="user")])
        if self._next is None:
            return Note(str(answer.content))
        return await self.send_message(Question(str(answer.content)), AgentId(self._next, "default"))

    @message_handler
    async def on_note(self, message: Note, ctx: MessageContext) -> None:
        await self._client.create([UserMessage(content=message.text, source="user")])
        if self._next is not None:
            await self.publish_message(Note("more"), TopicId(self._next, "default"))


class TeamOwner(RoutedAgent):
    """Answers by running a team."""

    @message_handler
    async def on_question(self, message: Question, ctx: MessageContext) -> None:
        await RoundRobinGroupChat([agent("writer", "7")], max_turns=1).run(task=message.text)


async def pair() -> SingleThreadedAgentRuntime:
    """A started runtime with `planner`, which sends its response to `executor`."""
    runtime = SingleThreadedAgentRuntime()
    models = {"planner": says(*"abcdefgh"), "executor": says(*"abcdefgh")}
    for name, next_agent in (("planner", "executor"), ("executor", None)):
        await Asker.register(runtime, name, lambda name=name, to=next_agent: Asker(models[name], to))
        await runtime.add_subscription(TypeSubscription(name, name))
    runtime.start()
    return runtime


TURNS = """\
invoke_agent planner [planner]
  chat [planner]
  invoke_agent executor [executor]
    chat [executor]"""


async def test_a_message_and_the_messages_that_follow_from_it_are_one_trace(spans):
    runtime = await pair()
    await runtime.send_message(Question("How many?"), AgentId("planner", "default"))
    await runtime.stop_when_idle()

    assert tree(spans.get_finished_spans()) == TURNS
    turn = only(spans.get_finished_spans(), "invoke_agent planner")
    assert turn.instrumentation_scope.name == "agl_autogen"
    assert attributes(turn) == {
        "agl.role": "planner",
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.system": "autogen",
        "gen_ai.agent.name": "planner",
        "gen_ai.agent.id": "planner/default",
        "gen_ai.agent.description": "asks its model",
    }


async def test_a_published_message_is_handled_below_the_publishers_turn(spans):
    runtime = await pair()
    await runtime.publish_message(Note("How many?"), TopicId("planner", "default"))
    await runtime.stop_when_idle()
    assert tree(spans.get_finished_spans()) == TURNS


async def test_messages_of_two_rollouts_to_one_runtime_stay_apart(spans):
    """The runtime's loop runs in the context in which it was started: here, in a third rollout."""
    with agl.rollout("elsewhere"):
        runtime = await pair()

    async def one(name: str) -> None:
        with agl.rollout(name):
            await runtime.send_message(Question(name), AgentId("planner", "default"))

    await asyncio.gather(one("r1"), one("r2"))
    await runtime.stop_when_idle()

    for rollout in named(spans.get_finished_spans(), "agl.rollout")[-2:]:
        inside = [span for span in spans.get_finished_spans() if span.context.trace_id == rollout.context.trace_id]
        assert tree(inside).splitlines() == ["agl.rollout", *(f"  {line}" for line in TURNS.splitlines())]
        assert len({attributes(span)["agl.rollout.id"] for span in inside}) == 1


async def test_the_spans_of_the_message_bus_are_in_the_trace_of_the_turns(spans, switch_on):
    switch_on(message_bus=True)
    with agl.rollout("r1"):
        runtime = await pair()
        await runtime.send_message(Question("How many?"), AgentId("planner", "default"))
        await runtime.stop_when_idle()
    finished = spans.get_finished_spans()
    assert len(finished) > 8
    assert len({span.context.trace_id for span in finished}) == 1
    assert attributes(only(finished, "invoke_agent executor"))["agl.role"] == "executor"


async def test_a_team_in_a_core_agent_is_a_child_of_its_turn(spans):
    runtime = SingleThreadedAgentRuntime()
    await TeamOwner.register(runtime, "owner", lambda: TeamOwner("has a team"))
    runtime.start()
    await runtime.send_message(Question("How many?"), AgentId("owner", "default"))
    await runtime.stop_when_idle()
    finished = [span for span in spans.get_finished_spans() if not span.name.startswith("create_agent")]
    assert tree(finished).splitlines() == [
        "invoke_agent owner [owner]",
        "  invoke_workflow RoundRobinGroupChat [owner]",
        "    invoke_agent writer [writer]",
        "      chat [writer]",
    ]


async def test_an_error_of_a_core_agent_reaches_the_sender_and_marks_the_turn_once(spans):
    runtime = await pair()
    with pytest.raises(ValueError, match="no such question"):
        await runtime.send_message(Question("FAIL"), AgentId("planner", "default"))
    await runtime.stop_when_idle()
    turn = only(spans.get_finished_spans(), "invoke_agent planner")
    assert (turn.status.status_code.name, turn.status.description) == ("ERROR", "ValueError: no such question")
    assert attributes(turn)["error.type"] == "ValueError"
    assert [event.name for event in turn.events] == ["exception"]


CORE_ALONE = """
import asyncio, sys
sys.modules["autogen_agentchat"] = None  # as where only autogen-core is installed
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
memory, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(memory))
trace.set_tracer_provider(provider)
from agl_autogen import AutoGenInstrumentor
AutoGenInstrumentor().instrument()
from autogen_ext.models.replay import ReplayChatCompletionClient
info = {"vision": False, "function_calling": True, "json_output": False, "family": "x", "structured_output": False}
asyncio.run(ReplayChatCompletionClient(["yes"], model_info=info).create([]))
AutoGenInstrumentor().uninstrument()
sys.exit([span.name for span in memory.get_finished_spans()] != ["chat"])
"""


def test_autogen_core_needs_no_agentchat():
    assert subprocess.run([sys.executable, "-c", CORE_ALONE], check=False).returncode == 0
