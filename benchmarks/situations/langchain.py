"""Situations of LangChain and LangGraph agents, each with the spans that it must have."""

import asyncio
import gc
import operator
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context
from typing import Annotated, Any, TypedDict

import httpx2
from anyio.from_thread import start_blocking_portal
from langchain_anthropic import ChatAnthropic
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig, RunnableLambda, RunnableParallel
from langchain_core.tools import StructuredTool, ToolException
from langchain_openai import ChatOpenAI, OpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, Send, interrupt
from openai import DefaultAsyncHttpxClient, DefaultHttpxClient
from opentelemetry import trace
from opentelemetry.instrumentation.utils import suppress_instrumentation

import agl
from agl.server_thread import ServerThread
from agl.store import open_store
from agl.trajectory import build_trajectory
from benchmarks.situations.desk import TRACER, Desk, Situations, expect
from benchmarks.situations.recording import has_ids, is_error, says
from tests.core.fake_engine import FakeEngine, token_id
from tests.langchain.agents import STOCK, two_async_roles, two_roles
from tests.langchain.anthropic_server import running_anthropic
from tests.langchain.modes import ASYNC_MODES, MODES, Mode, ainvoke, astream, invoke, stream
from tests.vllm_server import PROMPT_IDS, TOKEN_IDS

SITUATIONS = Situations()

ASK = "How many mugs?"
QUESTION: Any = {"messages": [("user", ASK)]}
_CALL = {"type": "tool_call", "name": "stock", "args": {"item": "mug"}}


async def astream_events(runnable: Any, value: Any, config: Any) -> Any:
    return [event async for event in runnable.astream_events(value, config, version="v2")]


ALL: list[Mode] = [*MODES, astream_events]
WHOLE_AND_STREAMED: list[Mode] = [invoke, ainvoke, stream, astream]
ONCE: list[Mode] = [invoke, ainvoke]


def chat(desk: Desk, **options: Any) -> ChatOpenAI:
    """A model that calls the desk's server."""
    defaults = {"model": "tiny", "base_url": desk.server.base_url, "api_key": "none", "max_retries": 0}
    return ChatOpenAI(**{**defaults, "stream_usage": True, **_clients(), **options})


def _clients() -> dict[str, Any]:
    """HTTP clients for one model: the default ones outlive an event loop. Without TLS, they load no certificates."""
    return {
        "http_client": DefaultHttpxClient(verify=False),
        "http_async_client": DefaultAsyncHttpxClient(verify=False),
    }


def agent_for(way: Mode, model: Any) -> Any:
    """Two nodes, `planner` and `executor`, and a tool in which user code opens a span."""
    return (two_async_roles if way in (*ASYNC_MODES, astream_events) else two_roles)(model)


def chain_of(model: Any) -> Any:
    return ChatPromptTemplate.from_template("{question}") | model | StrOutputParser()


def config(desk: Desk) -> RunnableConfig:
    return {"callbacks": [*desk.switched.callbacks]}


def current_name() -> str | None:
    """Name of the current span, None where there is none."""
    span = trace.get_current_span()
    return str(getattr(span, "name", "a span")) if span.get_span_context().is_valid else None


def expect_one_trace(desk: Desk, *, calls: int) -> None:
    recording = desk.recording
    expect(recording.open == 0, f"{recording.open} of {recording.started} spans never end")
    expect(len(recording.calls) == calls, f"{len(recording.calls)} model calls recorded, {calls} made")
    expect(len(recording.roots) == 1, f"{len(recording.roots)} spans have no parent, expected 1")


# ------------------------------------------------------------------ the tree


@SITUATIONS.row("an agent's run is one trace: one root, every model and tool call in it", ALL)
async def one_trace(desk: Desk, way: Mode) -> None:
    await way(agent_for(way, chat(desk)), QUESTION, config(desk))
    recording = await desk.settled()
    expect_one_trace(desk, calls=2)
    expect(len(recording.tools) == 1, f"{len(recording.tools)} tool calls recorded, 1 made")


@SITUATIONS.row("a model call is below the node that made it", ALL)
async def under_its_node(desk: Desk, way: Mode) -> None:
    await way(agent_for(way, chat(desk)), QUESTION, config(desk))
    recording = await desk.settled()
    expect_one_trace(desk, calls=2)
    for call, node in zip(recording.calls, ("planner", "executor"), strict=True):
        names = [span.name for span in recording.above(call)]
        expect(any(node in name for name in names), f"above the call of {node} are {', '.join(names) or 'no spans'}")


@SITUATIONS.row("prompt, model and parser of a chain are spans under the chain", ALL)
async def a_chain(desk: Desk, way: Mode) -> None:
    await way(chain_of(chat(desk)), {"question": ASK}, config(desk))
    recording = await desk.settled()
    expect_one_trace(desk, calls=1)
    for part in ("Prompt", "Parser"):
        expect(bool(recording.named(part)), f"there is no span for the {part.lower()}")


@SITUATIONS.row("a retriever and a completion model are spans under the chain", ONCE)
async def retriever_and_completion(desk: Desk, way: Mode) -> None:
    class Shelf(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
            return [Document("A mug.")]

    model = OpenAI(model="tiny", base_url=desk.server.base_url, api_key="none", **_clients())  # type: ignore[arg-type]
    await way(Shelf() | RunnableLambda(str) | model, ASK, config(desk))
    recording = await desk.settled()
    expect_one_trace(desk, calls=1)
    expect(len(recording.retrievals) == 1, "the retriever is not recorded as one")


@SITUATIONS.row("branches of a RunnableParallel are below it", ALL)
async def parallel_branches(desk: Desk, way: Mode) -> None:
    model = chat(desk)
    await way(RunnableParallel(left=model, right=model), ASK, config(desk))
    await desk.settled()
    expect_one_trace(desk, calls=2)


class Items(TypedDict):
    item: str
    found: Annotated[list[str], operator.add]


@SITUATIONS.row("a subgraph is below the node that contains it", ALL)
async def a_subgraph(desk: Desk, way: Mode) -> None:
    inner = agent_for(way, chat(desk))
    outer = StateGraph(MessagesState)
    outer.add_node("outer", inner)
    outer.add_edge(START, "outer").add_edge("outer", END)
    await way(outer.compile(), QUESTION, config(desk))
    recording = await desk.settled()
    expect_one_trace(desk, calls=2)
    names = [span.name for span in recording.above(recording.calls[0])]
    nodes = [node for name in names for node in ("planner", "outer") if node in name]
    expect(nodes[:1] == ["planner"] and nodes[-1:] == ["outer"], f"above the inner call are {', '.join(names)}")


@SITUATIONS.row("each call of a Send fan-out is below its own node", WHOLE_AND_STREAMED)
async def send_fan_out(desk: Desk, way: Mode) -> None:
    model = chat(desk)

    def look(state: Items) -> dict[str, Any]:
        return {"found": [model.invoke(state["item"]).text]}

    graph = StateGraph(Items)
    graph.add_node("look", look)
    graph.add_conditional_edges(START, lambda _: [Send("look", {"item": str(number)}) for number in range(3)], ["look"])
    graph.add_edge("look", END)
    await way(graph.compile(), {"item": "", "found": []}, config(desk))
    recording = await desk.settled()
    expect_one_trace(desk, calls=3)
    parents = {span.parent.span_id for span in recording.calls if span.parent}
    expect(len(parents) == 3, f"the 3 calls have {len(parents)} different parents")


@SITUATIONS.row("parallel tool calls have separate spans below the node that makes them", ONCE)
async def parallel_tools(desk: Desk, way: Mode) -> None:
    graph = StateGraph(MessagesState)
    graph.add_node("tools", ToolNode([STOCK]))
    graph.add_edge(START, "tools").add_edge("tools", END)
    asked = AIMessage("", tool_calls=[{**_CALL, "id": f"call_{number}"} for number in range(3)])
    await way(graph.compile(), {"messages": [asked]}, config(desk))
    recording = await desk.settled()
    expect(len(recording.tools) == 3, f"{len(recording.tools)} tool calls recorded, 3 made")
    for tool in recording.tools:
        expect(any("tools" in span.name for span in recording.above(tool)), "one is not under the node")


@SITUATIONS.row("calls from worker threads are below the run whose config they receive")
async def worker_threads(desk: Desk) -> None:
    model = chat(desk)

    def fan_out(_: Any, config: RunnableConfig) -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda question: model.invoke(question, config), ("one", "two")))

    RunnableLambda(fan_out).invoke(None, config(desk))
    await desk.settled()
    expect_one_trace(desk, calls=2)


@SITUATIONS.row("50 concurrent agents have separate traces", [ainvoke, astream])
async def fifty_at_once(desk: Desk, way: Mode) -> None:
    agent = two_async_roles(chat(desk))

    async def run(number: int) -> int:
        with TRACER.start_as_current_span(f"agent {number}") as span:
            await way(agent, {"messages": [("user", f"question {number}.")]}, config(desk))
            return span.get_span_context().trace_id

    traces = await asyncio.gather(*(run(number) for number in range(50)))
    recording = await desk.settled()
    expect(len(recording.traces) == 50, f"{len(recording.traces)} traces, expected 50")
    for number, trace_id in enumerate(traces):
        calls = [span for span in recording.calls if span.context.trace_id == trace_id]
        expect(len(calls) == 2, f"a trace has {len(calls)} model calls, expected 2")
        expect(all(says(call, f"question {number}.") for call in calls), "a trace has a call of another agent")


@SITUATIONS.row("an interrupt is not marked as failed, and the graph continues after it", ONCE)
async def interrupted(desk: Desk, way: Mode) -> None:
    model = chat(desk)

    def ask(_: MessagesState) -> dict[str, Any]:
        return {"messages": [("user", interrupt("which?")), model.invoke(ASK)]}

    graph = StateGraph(MessagesState)
    graph.add_node("ask", ask)
    graph.add_edge(START, "ask").add_edge("ask", END)
    agent = graph.compile(InMemorySaver())
    thread: RunnableConfig = {**config(desk), "configurable": {"thread_id": "1"}}
    await way(agent, QUESTION, thread)
    await way(agent, Command(resume="mugs"), thread)
    recording = await desk.settled()
    expect(recording.open == 0, f"{recording.open} spans never end")
    expect(len(recording.calls) == 1, f"{len(recording.calls)} model calls recorded, 1 made")
    failed = [span.name for span in recording.ended if is_error(span)]
    expect(not failed, f"marked as failed: {', '.join(failed)}")


@SITUATIONS.row("an attempt that failed and its retry are both recorded, one as failed", ONCE)
async def retried(desk: Desk, way: Mode) -> None:
    attempts: list[int] = []

    def flaky(_: Any) -> str:
        attempts.append(1)
        if len(attempts) == 1:
            raise ConnectionError("try again")
        return "Seven."

    retrying = RunnableLambda(flaky, name="flaky").with_retry(stop_after_attempt=2, wait_exponential_jitter=False)
    await way(RunnableLambda(str) | retrying, ASK, config(desk))
    recording = await desk.settled()
    failed = [is_error(span) for span in recording.named("flaky")]
    expect(
        failed.count(True) == 1, f"{failed.count(True)} of {len(failed)} spans of it are marked as failed, expected 1"
    )
    expect(not any(is_error(span) for span in recording.roots), "the whole run is marked as failed")


@SITUATIONS.row("a failed model and its fallback are both recorded, one as failed", ONCE)
async def fell_back(desk: Desk, way: Mode) -> None:
    broken = chat(desk, base_url=f"{desk.server.base_url}/nowhere")
    await way(broken.with_fallbacks([chat(desk)]), ASK, config(desk))
    recording = await desk.settled()
    expect_one_trace(desk, calls=2)
    failed = [is_error(span) for span in recording.calls]
    expect(failed == [True, False], f"{failed.count(True)} of 2 calls are marked as failed, expected 1")


# ------------------------------------------------------------------ the current span


@SITUATIONS.row("a span that user code opens in a tool is a child of the tool", ALL)
async def span_in_a_tool(desk: Desk, way: Mode) -> None:
    await way(agent_for(way, chat(desk)), QUESTION, config(desk))
    recording = await desk.settled()
    (look,) = recording.named("database")
    tools = {span.context.span_id for span in recording.tools}
    parent = next((span.name for span in recording.above(look)), "none")
    expect(look.parent is not None and look.parent.span_id in tools, f"its parent is {parent}")


@SITUATIONS.row("a span that user code opens around a model call is above the call", ALL)
async def span_around_a_call(desk: Desk, way: Mode) -> None:
    await way(agent_for(way, chat(desk)), QUESTION, config(desk))
    recording = await desk.settled()
    (think,) = recording.named("think")
    calls = [call for call in recording.calls if think in recording.above(call)]
    expect(len(calls) == 1, "the call is not below the span")


class _Transport(httpx2.HTTPTransport):
    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        with TRACER.start_as_current_span("POST"):
            return super().handle_request(request)


class _AsyncTransport(httpx2.AsyncHTTPTransport):
    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        with TRACER.start_as_current_span("POST"):
            return await super().handle_async_request(request)


@SITUATIONS.row("a span of the HTTP client is a child of its model call", ALL)
async def span_of_the_client(desk: Desk, way: Mode) -> None:
    clients = {
        "http_client": DefaultHttpxClient(transport=_Transport(verify=False)),
        "http_async_client": DefaultAsyncHttpxClient(transport=_AsyncTransport(verify=False)),
    }
    await way(agent_for(way, chat(desk, **clients)), QUESTION, config(desk))
    recording = await desk.settled()
    posts, calls = recording.named("POST"), {call.context.span_id for call in recording.calls}
    parents = {post.parent.span_id for post in posts if post.parent}
    above = {span.name for post in posts for span in recording.above(post)[:1]}
    expect(parents == calls, f"the requests' parent is {', '.join(sorted(above)) or 'none'}")


@SITUATIONS.row("a request carries the traceparent of its model call, without an HTTP instrumentation", ALL)
async def traceparent(desk: Desk, way: Mode) -> None:
    desk.server.seen.clear()
    await way(agent_for(way, chat(desk)), QUESTION, config(desk))
    recording = await desk.settled()
    sent = [seen.headers.get("traceparent", "") for seen in desk.server.seen]
    expect(all(sent), f"{sent.count('')} of {len(sent)} requests have no traceparent")
    calls = [f"{call.context.trace_id:032x}-{call.context.span_id:016x}" for call in recording.calls]
    expect([header[3:52] for header in sent] == calls, "it names a span that is not the call's")


@SITUATIONS.row("after a run the caller's current span is the same as before", ALL)
async def nothing_left_current(desk: Desk, way: Mode) -> None:
    model = chat(desk)
    runs = {"a model": (model, ASK), "a chain": (chain_of(model), {"question": ASK})}
    for what, (runnable, value) in {**runs, "an agent": (agent_for(way, model), QUESTION)}.items():
        await way(runnable, value, config(desk))
        expect(current_name() is None, f"after {what} {current_name()} stays current")
    with TRACER.start_as_current_span("around") as around:
        await way(chain_of(model), {"question": ASK}, config(desk))
        same = trace.get_current_span().get_span_context() == around.get_span_context()
        expect(same, f"within a span of the caller's, {current_name()} is current after it")


@SITUATIONS.row("successive runs in one task are separate traces", ALL)
async def one_after_the_other(desk: Desk, way: Mode) -> None:
    model = chat(desk)
    for _ in range(2):
        await way(model, ASK, config(desk))
        await way(chain_of(model), {"question": ASK}, config(desk))
        await way(agent_for(way, model), QUESTION, config(desk))
    recording = await desk.settled()
    expect(len(recording.traces) == 6, f"6 runs are {len(recording.traces)} traces")


@SITUATIONS.row("no span of a stream is current in the code that reads it", [stream, astream])
async def reading_a_stream(desk: Desk, way: Mode) -> None:
    for runnable, value in ((chat(desk), ASK), (agent_for(way, chat(desk)), QUESTION)):
        if way is stream:
            for _ in runnable.stream(value, config(desk)):
                expect(current_name() is None, f"between two items {current_name()} is current")
        else:
            async for _ in runnable.astream(value, config(desk)):
                expect(current_name() is None, f"between two items {current_name()} is current")


@SITUATIONS.row("nothing is logged as a warning or an error", ALL)
async def nothing_logged(desk: Desk, way: Mode) -> None:
    await way(chat(desk), ASK, config(desk))
    await way(chain_of(chat(desk)), {"question": ASK}, config(desk))
    await way(agent_for(way, chat(desk)), QUESTION, config(desk))
    await desk.settled()
    expect(not desk.log, f"{len(desk.log)} times, e.g. {desk.log[0][:80] if desk.log else ''}")


# ------------------------------------------------------------------ how runs end


@SITUATIONS.row("a tool that raises is marked as failed, and so are the runs that fail with it", ALL)
async def tool_raises(desk: Desk, way: Mode) -> None:
    async def ause(_: Any) -> Any:
        return await STOCK.ainvoke({"item": "car"})

    shop = RunnableLambda(lambda _: STOCK.invoke({"item": "car"}), ause, name="shop")
    with suppress(LookupError):
        await way(shop, None, config(desk))
    recording = await desk.settled()
    expect(recording.open == 0, f"{recording.open} spans never end")
    expect([is_error(span) for span in recording.tools] == [True], "the tool is not marked")
    expect(all(is_error(span) for span in recording.named("shop")), "the chain is not marked")


@SITUATIONS.row("a tool that returns its error is marked as failed", ALL)
async def tool_answers_with_its_error(desk: Desk, way: Mode) -> None:
    def refuse(item: str) -> str:
        """Refuse."""
        raise ToolException(f"no {item}")

    tool = StructuredTool.from_function(refuse, name="stock", handle_tool_error=True)
    await way(tool, {**_CALL, "id": "call_1"}, config(desk))
    recording = await desk.settled()
    expect([is_error(span) for span in recording.tools] == [True], "it is not marked")


@SITUATIONS.row("a model call that fails is marked as failed", ALL)
async def model_fails(desk: Desk, way: Mode) -> None:
    with suppress(Exception):
        await way(chat(desk), "FAIL", config(desk))
    recording = await desk.settled()
    expect(recording.open == 0, f"{recording.open} spans never end")
    expect([is_error(span) for span in recording.calls] == [True], "it is not marked")


async def a_model(desk: Desk) -> None:
    async with asyncio.timeout(0.15):
        await chat(desk).ainvoke("SLOW", config(desk))


async def an_agent(desk: Desk) -> None:
    task = asyncio.create_task(two_async_roles(chat(desk)).ainvoke({"messages": [("user", "SLOW")]}, config(desk)))
    await asyncio.sleep(0.15)
    task.cancel()
    await task


@SITUATIONS.row("a run that is cancelled ends its spans, as failed", [a_model, an_agent])
async def cancelled(desk: Desk, run: Any) -> None:
    with suppress(TimeoutError, asyncio.CancelledError):
        await run(desk)
    recording = await desk.settled()
    expect(recording.open == 0, f"{recording.open} of {recording.started} spans never end")
    expect([is_error(span) for span in recording.calls] == [True], "the call is not marked")


async def model_stream(desk: Desk) -> None:
    items: Iterator[Any] = chat(desk).stream(ASK, config(desk))
    next(items)
    next(items)


async def model_astream(desk: Desk) -> None:
    items: AsyncIterator[Any] = chat(desk).astream(ASK, config(desk))
    await anext(items)
    await anext(items)


async def agent_stream(desk: Desk) -> None:
    next(two_roles(chat(desk)).stream(QUESTION, config(desk), stream_mode="messages"))


async def agent_astream(desk: Desk) -> None:
    items = two_async_roles(chat(desk)).astream(QUESTION, config(desk), stream_mode="messages")
    await anext(items)
    await items.aclose()


@SITUATIONS.row(
    "an abandoned stream ends its spans, and leaves none current",
    [model_stream, model_astream, agent_stream, agent_astream],
)
async def broken_off(desk: Desk, read: Any) -> None:
    await read(desk)
    expect(current_name() is None, f"{current_name()} stays current")
    gc.collect()
    recording = await desk.settled()
    expect(recording.open == 0, f"{recording.open} of {recording.started} spans never end")
    expect(len(recording.calls) >= 1, "the model call is not recorded")


@SITUATIONS.row("no span stays in memory after 20 concurrent agents, failures, cancelled and abandoned runs")
async def nothing_held(desk: Desk) -> None:
    async def several() -> None:
        agent = two_async_roles(chat(desk))
        await asyncio.gather(*(agent.ainvoke(QUESTION, config(desk)) for _ in range(20)))
        await model_stream(desk)
        await model_astream(desk)
        with suppress(Exception):
            await chat(desk).ainvoke("FAIL", config(desk))
        for run in (a_model, an_agent):
            with suppress(TimeoutError, asyncio.CancelledError):
                await run(desk)

    await asyncio.to_thread(Context().run, asyncio.run, several())  # a closed event loop refers to no span
    await desk.settled()
    held = desk.recording.held()
    expect(held == 0, f"{held} of {desk.recording.started} spans are still in memory")


# ------------------------------------------------------------------ attributes of a call


@SITUATIONS.row("a model call has its messages, its response and the model's name", ALL)
async def content(desk: Desk, way: Mode) -> None:
    await way(chat(desk), ASK, config(desk))
    recording = await desk.settled()
    expect_one_trace(desk, calls=1)
    for text in (ASK, "Seven mugs", "tiny"):
        expect(says(recording.calls[0], text), f"{text!r} is missing")


@SITUATIONS.row("a model call has its usage and finish reason", ALL)
async def usage(desk: Desk, way: Mode) -> None:
    await way(chat(desk), ASK, config(desk))
    (call,) = (await desk.settled()).calls
    counts = " ".join(
        f"{value}" for name, value in (call.attributes or {}).items() if "usage" in name or "token" in name
    )
    expect("11" in counts and "3" in counts, "its usage is missing")
    expect(says(call, "stop"), "its finish reason is missing")


@SITUATIONS.row("a call of Anthropic's model has all of these", ALL)
async def other_model(desk: Desk, way: Mode) -> None:
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(running_anthropic()) as server:
        model = ChatAnthropic(model_name="claude-tiny", base_url=server.base_url, api_key="none", max_retries=0)  # type: ignore[call-arg]
        await way(model, ASK, config(desk))
    recording = await desk.settled()
    # Anthropic's client makes spans itself
    calls = [call for call in recording.calls if not call.name.startswith("anthropic.")]
    expect(len(calls) == 1, f"{len(calls)} model calls recorded, 1 made")
    for text in (ASK, "Seven mugs", "claude-tiny", "end_turn", "11"):
        expect(says(calls[0], text), f"{text!r} is missing")


@SITUATIONS.row("a model call names the node that made it", ALL)
async def role(desk: Desk, way: Mode) -> None:
    await way(agent_for(way, chat(desk)), QUESTION, config(desk))
    recording = await desk.settled()
    expect_one_trace(desk, calls=2)
    for call, node in zip(recording.calls, ("planner", "executor"), strict=True):
        expect(says(call, node), f"the call of {node} does not name it")


@SITUATIONS.row("a model call has the id of its response", WHOLE_AND_STREAMED)
async def response_id(desk: Desk, way: Mode) -> None:
    desk.server.seen.clear()
    await way(chat(desk), ASK, config(desk))
    (call,) = (await desk.settled()).calls
    expect(says(call, desk.server.seen[0].response_id), "missing")


@SITUATIONS.row("with our gateway a model call gets its token ids", WHOLE_AND_STREAMED)
async def ids_through_the_gateway(desk: Desk, way: Mode) -> None:
    store = open_store("memory://")
    with ServerThread(store, port=0, otlp_http_port=0, upstream=FakeEngine().app) as server:
        agl.init(endpoint=server.otlp_url)
        async with agl.rollout("r1"):
            await way(chat(desk, base_url=f"{server.base_url}/v1", model="writer@3"), "hello", config(desk))
        await desk.settled()
        agl.flush()
        agl.shutdown()
        trajectory = build_trajectory(store.query_spans("r1"))
    expected = [token_id(0, position) for position in range(3)]
    joined = [call for call in trajectory.calls if call.chat_span_id and call.response_ids == expected]
    expect(len(trajectory.calls) == 1 and len(joined) == 1, "it is not joined with the gateway's span")
    store.close()


@SITUATIONS.row("without a gateway a model call has its token ids, if the engine returns them", WHOLE_AND_STREAMED)
async def ids_without_a_gateway(desk: Desk, way: Mode) -> None:
    model = chat(desk, logprobs=True, extra_body={"return_token_ids": True})
    await way(desk.switched.capture(model), ASK, config(desk))
    (call,) = (await desk.settled()).calls
    expect(has_ids(call, PROMPT_IDS) and has_ids(call, TOKEN_IDS), "missing")


@SITUATIONS.row("each model call of one `agenerate` has its token ids, streaming or not")
async def ids_of_one_generate(desk: Desk) -> None:
    for streaming in (False, True):
        desk.recording.clear()
        model = chat(desk, logprobs=True, extra_body={"return_token_ids": True}, streaming=streaming)
        asked: list[Any] = [[HumanMessage("one")], [HumanMessage("two")]]
        await desk.switched.capture(model).agenerate(asked, callbacks=config(desk).get("callbacks"))
        calls = (await desk.settled()).calls
        have = [call for call in calls if has_ids(call, PROMPT_IDS) and has_ids(call, TOKEN_IDS)]
        expect(len(have) == 2, f"{len(have)} of 2 have them")


# ------------------------------------------------------------------ off


@SITUATIONS.row("in suppress_instrumentation() nothing is recorded", ALL)
async def suppressed(desk: Desk, way: Mode) -> None:
    with suppress_instrumentation():
        await way(chain_of(chat(desk)), {"question": ASK}, config(desk))
    await asyncio.sleep(0.05)
    expect(desk.recording.started == 0, f"{desk.recording.started} spans are recorded")


@SITUATIONS.row("after it is disabled it records nothing and adds no headers")
async def switched_off(desk: Desk) -> None:
    desk.switched.off()
    desk.server.seen.clear()
    for way in WHOLE_AND_STREAMED:
        await way(agent_for(way, chat(desk)), QUESTION, {})
    await asyncio.sleep(0.05)
    names = sorted({span.name for span in desk.recording.ended} - {"think", "look into the database"})
    expect(not names, f"still recorded: {', '.join(names)}")
    expect(not any("traceparent" in seen.headers for seen in desk.server.seen), "requests still have a traceparent")
