"""Request headers: the call, its rollout and its role."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

import pytest
from langchain_core.callbacks import AsyncCallbackHandler
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_openai import OpenAI
from openai import DefaultAsyncHttpxClient
from opentelemetry import baggage
from opentelemetry.context import attach, detach
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import agl
from agl_langchain import AglCallbackHandler
from tests.autogen.span_tree import attributes, named, only
from tests.core.fake_engine import USAGE
from tests.gateway.scripted_engine import ScriptedEngine
from tests.gateway.serving import gateway
from tests.langchain.agents import two_async_roles, two_roles
from tests.langchain.conftest import MakeModel
from tests.langchain.modes import MODES, Mode, ainvoke, invoke
from tests.vllm_server import FakeVllmServer, RecordedRequest


def parent_of(seen: RecordedRequest) -> str:
    """The span id in `traceparent`."""
    return seen.headers["traceparent"].split("-")[2]


def carried(seen: RecordedRequest) -> dict[str, str]:
    entries = (entry.split("=", 1) for entry in seen.headers["baggage"].split(","))
    return {name: unquote(value) for name, value in entries}


def span_id(span: ReadableSpan) -> str:
    return format(span.context.span_id, "016x")


def asked(seen: RecordedRequest) -> str:
    return str(seen.body["messages"][0]["content"])


@pytest.mark.parametrize("mode", MODES)
async def test_a_request_names_its_call_rollout_and_role(
    mode: Mode, instrumented: InMemorySpanExporter, server: FakeVllmServer, make_model: MakeModel
) -> None:
    async with agl.rollout("r1", group_id="g1", mode="eval"):
        await mode(two_roles(make_model()), {"messages": [("user", "How many mugs?")]}, {})

    calls = named(instrumented.get_finished_spans(), "chat tiny")
    assert [parent_of(seen) for seen in server.seen] == [span_id(span) for span in calls]
    rollout = {"agl.rollout.id": "r1", "agl.attempt.id": "r1-a1", "agl.group.id": "g1", "agl.mode": "eval"}
    assert [carried(seen) for seen in server.seen] == [
        rollout | {"agl.role": "planner"},
        rollout | {"agl.role": "executor"},
    ]


def check_apart(spans: tuple[ReadableSpan, ...], seen: list[RecordedRequest], runs: int) -> None:
    """Every request carries its rollout, its role, and the span of its own call."""
    calls = {span_id(span): attributes(span) for span in spans if span.name == "chat tiny"}
    assert len(seen) == len(calls) == 2 * runs
    for request in seen:
        sent, call = carried(request), calls[parent_of(request)]
        assert sent["agl.rollout.id"] == call["agl.rollout.id"] == asked(request)
        assert sent["agl.role"] == call["agl.role"] == ("executor" if "tools" in request.body else "planner")
    assert len({parent_of(request) for request in seen}) == 2 * runs


async def test_concurrent_agents_in_tasks_do_not_mix(
    instrumented: InMemorySpanExporter, server: FakeVllmServer, make_model: MakeModel
) -> None:
    agent = two_async_roles(make_model())

    async def run(number: int) -> None:
        async with agl.rollout(f"r{number}"):
            value = {"messages": [("user", f"r{number}")]}
            if number % 2:
                await agent.ainvoke(value)
            else:
                [_ async for _ in agent.astream(value, stream_mode="messages")]

    await asyncio.gather(*(run(number) for number in range(64)))

    check_apart(instrumented.get_finished_spans(), server.seen, 64)


def test_concurrent_agents_in_threads_do_not_mix(
    instrumented: InMemorySpanExporter, server: FakeVllmServer, make_model: MakeModel
) -> None:
    agent = two_roles(make_model())

    def run(number: int) -> None:
        with agl.rollout(f"r{number}"):
            value = {"messages": [("user", f"r{number}")]}
            if number % 3 == 0:
                agent.invoke(value)
            elif number % 3 == 1:
                agent.batch([value, value])
            else:
                list(agent.stream(value))

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(run, range(64)))

    check_apart(instrumented.get_finished_spans(), server.seen, 64 + len(range(1, 64, 3)))


def test_each_request_of_a_batch_in_threads_is_joined(
    instrumented: InMemorySpanExporter, server: FakeVllmServer, make_model: MakeModel
) -> None:
    with agl.rollout("r1"):
        make_model().batch([f"question {number}" for number in range(16)])

    calls = {span_id(span): attributes(span) for span in named(instrumented.get_finished_spans(), "chat tiny")}
    assert len(calls) == 16
    for seen in server.seen:
        assert asked(seen) in str(calls[parent_of(seen)]["gen_ai.input.messages"])
        assert carried(seen)["agl.rollout.id"] == "r1"


async def test_requests_of_one_generate_are_not_joined_with_the_wrong_call(
    instrumented: InMemorySpanExporter, server: FakeVllmServer, make_model: MakeModel
) -> None:
    """Their runs share a context, so the header names their parent run, not the call."""
    model = make_model()
    conversations: list[Any] = [[HumanMessage("one")], [HumanMessage("two")]]

    async def ask(_: Any, config: RunnableConfig) -> None:
        await model.agenerate(conversations, callbacks=config["callbacks"])

    async with agl.rollout("r1"):
        await RunnableLambda(ask).with_config(run_name="both").ainvoke(None, {"tags": ["role:asker"]})

    spans = instrumented.get_finished_spans()
    assert {parent_of(seen) for seen in server.seen} == {span_id(only(spans, "invoke_workflow both"))}
    assert {carried(seen)["agl.role"] for seen in server.seen} == {"asker"}
    ids = {attributes(span)["gen_ai.response.id"] for span in named(spans, "chat tiny")}
    assert ids == {seen.response_id for seen in server.seen}


async def test_concurrent_streams_do_not_mix_response_ids(
    instrumented: InMemorySpanExporter, server: FakeVllmServer, make_model: MakeModel
) -> None:
    begun = asyncio.Event()

    class Watch(AsyncCallbackHandler):
        async def on_llm_new_token(self, *args: Any, **kwargs: Any) -> None:
            begun.set()

    model = make_model(streaming=True)
    both = model.agenerate([[HumanMessage("one")], [HumanMessage("SLOW")]], callbacks=[Watch()])
    task = asyncio.ensure_future(both)
    await begun.wait()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task

    own = {asked(seen): seen.response_id for seen in server.seen}
    said = [attributes(span) for span in named(instrumented.get_finished_spans(), "chat tiny")]
    assert len(said) == 2
    for call, name in zip(said, ("one", "SLOW"), strict=True):
        assert call.get("gen_ai.response.id") in (None, own.get(name))


async def test_structured_output_carries_the_headers_too(
    instrumented: InMemorySpanExporter, server: FakeVllmServer, make_model: MakeModel
) -> None:
    schema = {
        "title": "Count",
        "description": "A count.",
        "type": "object",
        "properties": {"count": {"type": "integer"}},
    }
    structured = make_model().with_structured_output(schema, method="json_schema", include_raw=True)

    await structured.ainvoke("How many?")
    structured.invoke("How many?")

    calls = named(instrumented.get_finished_spans(), "chat tiny")
    assert [parent_of(seen) for seen in server.seen] == [span_id(span) for span in calls]


@pytest.mark.parametrize("mode", [invoke, ainvoke])
async def test_a_completion_request_carries_them(
    mode: Mode, instrumented: InMemorySpanExporter, server: FakeVllmServer
) -> None:
    async with DefaultAsyncHttpxClient() as http_client:
        model = OpenAI(model="tiny", base_url=server.base_url, api_key="none", http_async_client=http_client)  # type: ignore[arg-type]
        with agl.rollout("r1"), agl.role("writer"):
            await mode(model, "How many mugs?", {})

    (seen,) = server.seen
    assert parent_of(seen) == span_id(only(instrumented.get_finished_spans(), "text_completion tiny"))
    assert (carried(seen)["agl.rollout.id"], carried(seen)["agl.role"]) == ("r1", "writer")


def test_a_request_with_several_prompts_is_beside_their_spans(instrumented: InMemorySpanExporter) -> None:
    """By their texts `agl.trajectory.join` joins them with the choices."""
    choices = [{"index": number, "text": "yes", "finish_reason": "stop"} for number in range(2)]
    whole = {"id": "c", "model": "tiny", "choices": choices, "usage": USAGE}
    with gateway(ScriptedEngine(whole=whole)) as setup:
        model = OpenAI(model="tiny", base_url=f"{setup.url}/v1", api_key="none")  # type: ignore[arg-type]
        with agl.rollout("r1"):
            model.batch(["How many?", "How much?"])
        answered = setup.store.query_spans("r1")

    rollout = only(instrumented.get_finished_spans(), "agl.rollout")
    asked = named(instrumented.get_finished_spans(), "text_completion tiny")
    assert len(asked) == len(answered) == 2
    assert [span.parent for span in asked] == [rollout.get_span_context()] * 2
    assert [span.parent_id for span in answered] == [span_id(rollout)] * 2


def test_the_users_headers_stay_and_the_users_baggage_is_not_sent(
    instrumented: InMemorySpanExporter, server: FakeVllmServer, make_model: MakeModel
) -> None:
    token = attach(baggage.set_baggage("customer", "secret"))
    with agl.rollout("r1"):
        make_model().bind(extra_headers={"X-Shop": "mugs"}).invoke("hello")
    detach(token)

    (seen,) = server.seen
    assert seen.headers["x-shop"] == "mugs"
    assert "secret" not in seen.headers["baggage"]


def test_no_headers_without_the_instrumentor_or_when_suppressed(
    instrumented: InMemorySpanExporter, server: FakeVllmServer, make_model: MakeModel
) -> None:
    with agl.rollout("r1"), suppress_instrumentation():
        make_model().invoke("hello")

    assert "traceparent" not in server.seen[0].headers and "baggage" not in server.seen[0].headers
    assert named(instrumented.get_finished_spans(), "chat tiny") == []


def test_the_handler_alone_does_not_change_requests_and_joins_by_response_id(
    spans: InMemorySpanExporter, server: FakeVllmServer, make_model: MakeModel
) -> None:
    make_model().invoke("hello", {"callbacks": [AglCallbackHandler()]})

    (seen,) = server.seen
    assert "traceparent" not in seen.headers
    assert attributes(only(spans.get_finished_spans(), "chat tiny"))["gen_ai.response.id"] == seen.response_id
