"""Situations of AutoGen teams, each with the spans that it must have."""

import asyncio
import gc
import json
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from contextvars import Context
from typing import Any

import httpx2
from autogen_agentchat.agents import AssistantAgent, SocietyOfMindAgent
from autogen_agentchat.conditions import TextMentionTermination
from autogen_agentchat.messages import ModelClientStreamingChunkEvent
from autogen_agentchat.teams import (
    DiGraphBuilder,
    GraphFlow,
    MagenticOneGroupChat,
    RoundRobinGroupChat,
    SelectorGroupChat,
    Swarm,
)
from autogen_core import CancellationToken, SingleThreadedAgentRuntime
from autogen_core.models import CreateResult, ModelInfo, UserMessage
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from autogen_ext.models.replay import ReplayChatCompletionClient
from autogen_ext.tools.mcp import McpWorkbench
from openai import DefaultAsyncHttpxClient
from opentelemetry import trace
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import ReadableSpan

import agl
from agl.server_thread import ServerThread
from agl.store import open_store
from agl.trajectory import build_trajectory
from benchmarks.situations.desk import TRACER, Desk, Situations, expect
from benchmarks.situations.recording import has_ids, is_error, says
from tests.autogen.test_mcp import SERVER
from tests.core.fake_engine import FakeEngine, token_id
from tests.vllm_server import PROMPT_IDS, TOKEN_IDS

SITUATIONS = Situations()

ASK = "How many mugs?"
_BUS = "AUTOGEN_DISABLE_RUNTIME_TRACING"
_INFO: ModelInfo = {
    "vision": False,
    "function_calling": True,
    "json_output": False,
    "family": "unknown",
    "structured_output": False,
}


async def stock(item: str) -> str:
    """Number of items in stock."""
    with TRACER.start_as_current_span("look into the database"):
        return f"7 x {item}"


async def broken_stock(item: str) -> str:
    """Number of items in stock."""
    raise LookupError(f"no {item} in the shop")


def chat(desk: Desk, **options: Any) -> OpenAIChatCompletionClient:
    defaults = {"model": "tiny", "base_url": desk.server.base_url, "api_key": "none", "max_retries": 0}
    client = {"http_client": DefaultAsyncHttpxClient(verify=False)}  # without TLS, because loading certificates is slow
    return OpenAIChatCompletionClient(model_info=_INFO, **{**defaults, **client, **options})


def ready(desk: Desk, team: Any) -> Any:
    """`team`, after clearing the recording: AutoGen records a span for each agent that is created."""
    desk.recording.clear()
    return team


def pair(desk: Desk, *, streaming: bool = False, tool: Any = stock, **options: Any) -> RoundRobinGroupChat:
    """A team of a planner and an executor with a tool: three model calls, one tool call."""
    model = chat(desk, **options)
    planner = AssistantAgent("planner", model, model_client_stream=streaming)
    tools: Any = [FunctionTool(tool, description="Number of items in stock.", name="stock")]
    executor = AssistantAgent("executor", model, tools=tools, reflect_on_tool_use=True, model_client_stream=streaming)
    return ready(desk, RoundRobinGroupChat([planner, executor], max_turns=2))


async def run(desk: Desk, task: str = ASK, cancellation_token: Any = None, **options: Any) -> None:
    await pair(desk, **options).run(task=task, cancellation_token=cancellation_token)


async def run_stream(desk: Desk, task: str = ASK, cancellation_token: Any = None, **options: Any) -> None:
    team = pair(desk, streaming=True, **options)
    async for _ in team.run_stream(task=task, cancellation_token=cancellation_token):
        pass


WAYS = [run, run_stream]


async def create(model: Any, **options: Any) -> None:
    await model.create([UserMessage(content=ASK, source="user")], **options)


async def create_stream(model: Any, **options: Any) -> None:
    async for _ in model.create_stream([UserMessage(content=ASK, source="user")], **options):
        pass


CALLS = [create, create_stream]


def current_name() -> str | None:
    span = trace.get_current_span()
    return str(getattr(span, "name", "a span")) if span.get_span_context().is_valid else None


def expect_one_trace(desk: Desk, *, calls: int) -> None:
    recording = desk.recording
    expect(recording.open == 0, f"{recording.open} of {recording.started} spans never end")
    expect(len(recording.calls) == calls, f"{len(recording.calls)} model calls recorded, {calls} made")
    expect(len(recording.roots) == 1, f"{len(recording.traces)} traces, expected 1")


# ------------------------------------------------------------------ the tree


def swarm(desk: Desk) -> Any:
    planner = AssistantAgent("planner", chat(desk), handoffs=["executor"])
    return Swarm([planner, AssistantAgent("executor", chat(desk))], termination_condition=_SAYS_END)


def selector(desk: Desk) -> Any:
    desk.server.words = ("ex", "ecu", "tor")
    agents = [AssistantAgent(name, chat(desk)) for name in ("planner", "executor")]
    return SelectorGroupChat([*agents], chat(desk), max_turns=1)


def graph_flow(desk: Desk) -> Any:
    planner, executor = (AssistantAgent(name, chat(desk)) for name in ("planner", "executor"))
    graph = DiGraphBuilder().add_node(planner).add_node(executor).add_edge(planner, executor).build()
    return GraphFlow([planner, executor], graph)


def nested(desk: Desk) -> Any:
    inner = RoundRobinGroupChat([AssistantAgent("planner", chat(desk))], name="inner", max_turns=1)
    return RoundRobinGroupChat([inner, AssistantAgent("executor", chat(desk))], name="outer", max_turns=2)


def society_of_mind(desk: Desk) -> Any:
    inner = RoundRobinGroupChat([AssistantAgent("planner", chat(desk))], max_turns=1)
    return RoundRobinGroupChat([SocietyOfMindAgent("society", inner, chat(desk))], max_turns=1)


def magentic_one(desk: Desk) -> Any:
    """Makes four model calls: facts, plan, ledger and answer. The ledger marks the request as satisfied."""
    desk.server.words = (json.dumps({name: {"reason": "so", "answer": answer} for name, answer in _LEDGER.items()}),)
    return MagenticOneGroupChat([AssistantAgent("executor", chat(desk))], chat(desk))


_LEDGER = {
    "is_request_satisfied": True,
    "is_progress_being_made": True,
    "is_in_loop": False,
    "instruction_or_question": "Look it up.",
    "next_speaker": "executor",
}
_SAYS_END = TextMentionTermination("TERMINATE")
_WORDS = ("Seven", " mugs", " TERMINATE")


@SITUATIONS.row("a team's run without an outer span is one trace: one root, every model and tool call in it", WAYS)
async def one_trace(desk: Desk, way: Any) -> None:
    await way(desk)
    recording = await desk.settled()
    expect_one_trace(desk, calls=3)
    expect(len(recording.tools) >= 1, "the tool call is not recorded")


OTHER_TEAMS = [swarm, selector, graph_flow, nested, society_of_mind, magentic_one]


@SITUATIONS.row("runs of other kinds of teams are one trace each", OTHER_TEAMS)
async def other_teams(desk: Desk, make: Any) -> None:
    try:
        team = ready(desk, make(desk))
        await team.run(task=ASK)
    finally:
        desk.server.words = _WORDS
    await desk.settled()
    expect_one_trace(desk, calls=4 if make is magentic_one else 2)


@SITUATIONS.row("a run with the spans of AutoGen's message bus is one trace", WAYS)
async def with_the_bus(desk: Desk, way: Any) -> None:
    quiet = os.environ.pop(_BUS)
    try:
        await way(desk)
    finally:
        os.environ[_BUS] = quiet
    await desk.settled()
    expect_one_trace(desk, calls=3)


@SITUATIONS.row("a run in a runtime that the user started before is in the caller's trace")
async def own_runtime(desk: Desk) -> None:
    runtime = SingleThreadedAgentRuntime()
    runtime.start()
    agents = [AssistantAgent(name, chat(desk)) for name in ("planner", "executor")]
    with TRACER.start_as_current_span("around") as around:
        await ready(desk, RoundRobinGroupChat([*agents], max_turns=2, runtime=runtime)).run(task=ASK)
    await runtime.stop()
    recording = await desk.settled()
    expect(len(recording.calls) == 2, f"{len(recording.calls)} model calls recorded, 2 made")
    traces = recording.traces
    expect(traces == {around.get_span_context().trace_id}, f"{len(traces)} traces, or one that is not the caller's")


@SITUATIONS.row("a team whose state is saved and loaded between two runs has one trace for each run")
async def saved_and_loaded(desk: Desk) -> None:
    before, after = pair(desk), pair(desk)
    desk.server.seen.clear()
    await before.run(task=ASK)
    await after.load_state(await before.save_state())
    await after.run(task=ASK)
    recording = await desk.settled()
    expect(recording.open == 0, f"{recording.open} of {recording.started} spans never end")
    made = len(desk.server.seen)
    expect(made > 3 and len(recording.calls) == made, f"{len(recording.calls)} model calls recorded, {made} made")
    expect(len(recording.roots) == 2, f"{len(recording.roots)} spans have no parent, expected 2")


@SITUATIONS.row("a model call is below the turn of the agent that made it", WAYS)
async def under_its_turn(desk: Desk, way: Any) -> None:
    await way(desk)
    recording = await desk.settled()
    expect(len(recording.calls) == 3, f"{len(recording.calls)} model calls recorded, 3 made")
    for call, agent in zip(recording.calls, ("planner", "executor", "executor"), strict=True):
        above = recording.above(call)
        expect(any(_is_turn_of(span, agent) for span in above), f"above a call of {agent} is no turn of it")


def _is_turn_of(span: ReadableSpan, agent: str) -> bool:
    return agent in span.name or says(span, agent)


@SITUATIONS.row("a tool call of an MCP server is below the turn that makes it")
async def mcp_tool(desk: Desk) -> None:
    async with McpWorkbench(SERVER) as warehouse:
        executor = ready(desk, AssistantAgent("executor", chat(desk), workbench=warehouse))
        await executor.run(task=ASK)
    recording = await desk.settled()
    expect(len(recording.tools) >= 1, "it is not recorded")
    for tool in recording.tools:
        expect(any(_is_turn_of(span, "executor") for span in recording.above(tool)), "above it is no turn")


class EchoClient(ReplayChatCompletionClient):
    """A model client class of the user's."""

    async def create(self, messages: Sequence[Any], **options: Any) -> CreateResult:
        return await super().create(messages, **options)

    async def create_stream(self, messages: Sequence[Any], **options: Any) -> AsyncGenerator[str | CreateResult, None]:
        async for item in super().create_stream(messages, **options):
            yield item


@SITUATIONS.row("a call of a client other than OpenAI's is recorded once", CALLS)
async def other_clients(desk: Desk, ask: Any) -> None:
    for client_class in (ReplayChatCompletionClient, EchoClient):
        desk.recording.clear()
        await ask(client_class(["Seven."]))
        calls = (await desk.settled()).calls
        expect(len(calls) == 1, f"{len(calls)} model calls recorded of {client_class.__name__}, 1 made")


@SITUATIONS.row("20 concurrent teams have separate traces", WAYS)
async def twenty_at_once(desk: Desk, way: Any) -> None:
    async def under_a_span(number: int) -> int:
        with TRACER.start_as_current_span(f"team {number}") as span:
            await way(desk, task=f"question {number}.")
            return span.get_span_context().trace_id

    traces = await asyncio.gather(*(under_a_span(number) for number in range(20)))
    recording = await desk.settled()
    made = [span for span in recording.calls if span.context.trace_id in set(traces)]
    expect(len(made) == 60, f"{len(made)} of 60 model calls are in a trace of a caller")
    for number, trace_id in enumerate(traces):
        calls = [span for span in recording.calls if span.context.trace_id == trace_id]
        expect(len(calls) == 3, f"a trace has {len(calls)} model calls, expected 3")
        expect(all(says(call, f"question {number}.") for call in calls), "a trace has a call of another team")


# ------------------------------------------------------------------ the current span


@SITUATIONS.row("a span that user code opens in a tool is a child of the tool", WAYS)
async def span_in_a_tool(desk: Desk, way: Any) -> None:
    await way(desk)
    recording = await desk.settled()
    (look,) = recording.named("database")
    tools = {span.context.span_id for span in recording.tools}
    expect(look.parent is not None and look.parent.span_id in tools, "its parent is another span")


class _Transport(httpx2.AsyncHTTPTransport):
    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        with TRACER.start_as_current_span("POST"):
            return await super().handle_async_request(request)


@SITUATIONS.row("a span of the HTTP client is a child of its model call", WAYS)
async def span_of_the_client(desk: Desk, way: Any) -> None:
    await way(desk, http_client=DefaultAsyncHttpxClient(transport=_Transport(verify=False)))
    recording = await desk.settled()
    calls = {call.context.span_id for call in recording.calls}
    parents = {post.parent.span_id for post in recording.named("POST") if post.parent}
    expect(bool(calls) and parents == calls, "the requests' parent is another span")


@SITUATIONS.row("a request carries the traceparent of its model call, without an HTTP instrumentation", WAYS)
async def traceparent(desk: Desk, way: Any) -> None:
    desk.server.seen.clear()
    await way(desk)
    recording = await desk.settled()
    sent = [seen.headers.get("traceparent", "") for seen in desk.server.seen]
    expect(all(sent), f"{sent.count('')} of {len(sent)} requests have no traceparent")
    calls = [f"{call.context.trace_id:032x}-{call.context.span_id:016x}" for call in recording.calls]
    expect([header[3:52] for header in sent] == calls, "it names a span that is not the call's")


@SITUATIONS.row("after a run the caller's current span is the same as before", WAYS)
async def nothing_left_current(desk: Desk, way: Any) -> None:
    await way(desk)
    expect(current_name() is None, f"{current_name()} stays current")
    with TRACER.start_as_current_span("around") as around:
        await way(desk)
        expect(
            trace.get_current_span() is around, f"within a span of the caller's, {current_name()} is current after it"
        )


def model(desk: Desk) -> Any:
    return chat(desk).create_stream([UserMessage(content=ASK, source="user")])


def agent(desk: Desk) -> Any:
    return ready(desk, AssistantAgent("solo", chat(desk), model_client_stream=True)).run_stream(task=ASK)


def team(desk: Desk) -> Any:
    return pair(desk, streaming=True).run_stream(task=ASK)


STREAMS = [model, agent, team]


@SITUATIONS.row("no span of a stream is current in the code that reads it", STREAMS)
async def reading_a_stream(desk: Desk, open_stream: Any) -> None:
    async for _ in open_stream(desk):
        expect(current_name() is None, f"between two items {current_name()} is current")


@SITUATIONS.row("an abandoned stream ends its spans, leaves none current and logs nothing", STREAMS)
async def broken_off(desk: Desk, open_stream: Any) -> None:
    async def read() -> None:
        async for item in open_stream(desk):
            if isinstance(item, str | ModelClientStreamingChunkEvent):
                break

    await read()
    gc.collect()
    await asyncio.sleep(0.1)  # the event loop closes the generator, and AutoGen completes a team's run
    recording = await desk.settled()
    expect(current_name() is None, f"{current_name()} stays current")
    expect(recording.open == 0, f"{recording.open} of {recording.started} spans never end")
    expect(len(recording.calls) >= 1, "the model call is not recorded")
    expect(not desk.log, f"logged: {desk.log[0][:60] if desk.log else ''}")


@SITUATIONS.row("nothing is logged as a warning or an error", WAYS)
async def nothing_logged(desk: Desk, way: Any) -> None:
    await way(desk)
    await desk.settled()
    expect(not desk.log, f"{len(desk.log)} times, e.g. {desk.log[0][:80] if desk.log else ''}")


# ------------------------------------------------------------------ how runs end


@SITUATIONS.row("a tool that raises is marked as failed", WAYS)
async def tool_raises(desk: Desk, way: Any) -> None:
    await way(desk, tool=broken_stock)
    tools = (await desk.settled()).tools
    failed = [is_error(span) for span in tools]
    expect(bool(tools) and all(failed), f"{failed.count(False)} of {len(tools)} spans of the tool are not marked")


@SITUATIONS.row("a model call that fails is marked as failed, and so is the turn it fails", WAYS)
async def model_fails(desk: Desk, way: Any) -> None:
    with suppress(Exception):
        await way(desk, task="FAIL")
    recording = await desk.settled()
    expect(recording.open == 0, f"{recording.open} spans never end")
    expect([is_error(span) for span in recording.calls] == [True], "the call is not marked")
    above = [span for span in recording.above(recording.calls[0]) if not is_error(span)]
    expect(not above, f"not marked: {', '.join(span.name for span in above)}")


@SITUATIONS.row("a run that is cancelled ends its spans, the model call as failed", WAYS)
async def cancelled(desk: Desk, way: Any) -> None:
    await _cancelled(desk, way)
    recording = await desk.settled()
    expect(recording.open == 0, f"{recording.open} of {recording.started} spans never end")
    expect([is_error(span) for span in recording.calls] == [True], "the call is not marked")


async def _cancelled(desk: Desk, way: Any) -> None:
    token = CancellationToken()
    asyncio.get_running_loop().call_later(0.15, token.cancel)
    with suppress(asyncio.CancelledError):
        await way(desk, task="SLOW", cancellation_token=token)


@SITUATIONS.row("no span stays in memory after 20 concurrent teams, failures and cancelled runs")
async def nothing_held(desk: Desk) -> None:
    async def several() -> None:
        await asyncio.gather(*(run(desk) for _ in range(20)))
        for way in WAYS:
            with suppress(Exception):
                await way(desk, task="FAIL")
            await _cancelled(desk, way)

    await asyncio.to_thread(Context().run, asyncio.run, several())  # a closed event loop refers to no span
    await desk.settled()
    held = desk.recording.held()
    expect(held == 0, f"{held} spans are still in memory")


# ------------------------------------------------------------------ attributes of a call


@SITUATIONS.row("a model call has its messages, its response and the model's name", CALLS)
async def content(desk: Desk, ask: Any) -> None:
    await ask(chat(desk))
    expect_one_trace(await _settled(desk), calls=1)
    for text in (ASK, "Seven mugs", "tiny"):
        expect(says(desk.recording.calls[0], text), f"{text!r} is missing")


@SITUATIONS.row("a model call has its usage and finish reason", CALLS)
async def usage(desk: Desk, ask: Any) -> None:
    await ask(chat(desk), **({"include_usage": True} if ask is create_stream else {}))
    (call,) = (await desk.settled()).calls
    attributes: Mapping[str, Any] = call.attributes or {}
    counts = " ".join(f"{value}" for name, value in attributes.items() if "usage" in name or "token" in name)
    expect("11" in counts and "3" in counts, "its usage is missing")
    expect(says(call, "stop"), "its finish reason is missing")


@SITUATIONS.row("a model call names the agent that made it", WAYS)
async def role(desk: Desk, way: Any) -> None:
    await way(desk)
    calls = (await desk.settled()).calls
    expect(len(calls) == 3, f"{len(calls)} model calls recorded, 3 made")
    named = [
        _named_elsewhere(call, agent) for call, agent in zip(calls, ("planner", "executor", "executor"), strict=True)
    ]
    expect(all(named), f"{named.count(False)} of 3 do not")


def _named_elsewhere(call: ReadableSpan, agent: str) -> bool:
    """Whether an attribute equals the agent's name. Messages do not count, because they name their source."""
    return any(value == agent for value in (call.attributes or {}).values())


@SITUATIONS.row("a model call has the id of its response", CALLS)
async def response_id(desk: Desk, ask: Any) -> None:
    desk.server.seen.clear()
    await ask(chat(desk))
    (call,) = (await desk.settled()).calls
    expect(says(call, desk.server.seen[0].response_id), "missing")


@SITUATIONS.row("with our gateway a model call gets its token ids", CALLS)
async def ids_through_the_gateway(desk: Desk, ask: Any) -> None:
    store = open_store("memory://")
    with ServerThread(store, port=0, otlp_http_port=0, upstream=FakeEngine().app) as server:
        agl.init(endpoint=server.otlp_url)
        async with agl.rollout("r1"):
            await ask(chat(desk, base_url=f"{server.base_url}/v1", model="writer@3"))
        await desk.settled()
        agl.flush()
        agl.shutdown()
        trajectory = build_trajectory(store.query_spans("r1"))
    expected = [token_id(0, position) for position in range(3)]
    joined = [call for call in trajectory.calls if call.chat_span_id and call.response_ids == expected]
    expect(len(trajectory.calls) == 1 and len(joined) == 1, "it is not joined with the gateway's span")
    store.close()


@SITUATIONS.row("without a gateway a model call has its token ids, if the engine returns them", CALLS)
async def ids_without_a_gateway(desk: Desk, ask: Any) -> None:
    asked = {"logprobs": True, "extra_body": {"return_token_ids": True}}
    await ask(chat(desk), extra_create_args=asked)
    (call,) = (await desk.settled()).calls
    expect(has_ids(call, PROMPT_IDS) and has_ids(call, TOKEN_IDS), "missing")


# ------------------------------------------------------------------ off


@SITUATIONS.row("in suppress_instrumentation() only AutoGen's own spans are recorded", WAYS)
async def suppressed(desk: Desk, way: Any) -> None:
    with suppress_instrumentation():
        await way(desk)
    expect_only_autogens_own(await _settled(desk))


@SITUATIONS.row("after it is disabled it records nothing and adds no headers", WAYS)
async def switched_off(desk: Desk, way: Any) -> None:
    desk.switched.off()
    desk.server.seen.clear()
    await way(desk)
    expect_only_autogens_own(await _settled(desk))
    expect(not any("traceparent" in seen.headers for seen in desk.server.seen), "requests still have a traceparent")


async def _settled(desk: Desk) -> Desk:
    await desk.settled()
    return desk


def expect_only_autogens_own(desk: Desk) -> None:
    recorded = {span.name for span in desk.recording.ended if _scope(span) not in ("autogen-core", "the user's own")}
    expect(not recorded, f"still recorded: {', '.join(sorted(recorded))}")


def _scope(span: ReadableSpan) -> str:
    return span.instrumentation_scope.name if span.instrumentation_scope else ""
