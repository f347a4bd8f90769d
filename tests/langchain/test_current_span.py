"""A run's span is the current one inside the run, and nowhere else."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.messages import AIMessageChunk
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.runnables import RunnableConfig, RunnableGenerator, RunnableLambda
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import agl
from agl_langchain import AglCallbackHandler
from agl_langchain._run import OPEN_RUNS
from tests.autogen.span_tree import attributes, named, only, tree
from tests.langchain.agents import STOCK, TRACER, two_roles
from tests.langchain.conftest import MakeModel
from tests.langchain.modes import MODES, Mode
from tests.langchain.test_tree import GOLDEN, QUESTION


def current() -> trace.SpanContext:
    return trace.get_current_span().get_span_context()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["model", "sequence", "graph"])
async def test_a_finished_run_is_not_the_parent_of_later_runs_in_its_task(
    kind: str, mode: Mode, instrumented: InMemorySpanExporter, make_model: MakeModel
) -> None:
    model = make_model()
    runnables = {"model": model, "sequence": model | StrOutputParser(), "graph": two_roles(model)}
    for _ in range(3):
        await mode(runnables[kind], QUESTION if kind == "graph" else "How many?", {})
        assert not current().is_valid

    roots = [span for span in instrumented.get_finished_spans() if span.parent is None]
    assert len({span.context.trace_id for span in roots}) == len(roots) == 3


@pytest.mark.parametrize("mode", MODES)
async def test_a_span_of_the_http_client_is_a_child_of_the_call(mode: Mode, instrumented: InMemorySpanExporter) -> None:

    class Client(FakeListChatModel):
        def _call(self, *args: Any, **kwargs: Any) -> str:
            with TRACER.start_as_current_span("POST"):
                return "Seven."

        def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            yield ChatGenerationChunk(message=AIMessageChunk(self._call()))

        async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[ChatGenerationChunk]:
            yield ChatGenerationChunk(message=AIMessageChunk(self._call()))

    await mode(Client(responses=[]), "hello", {})

    assert tree(instrumented.get_finished_spans()) == "chat\n  POST"


@pytest.mark.parametrize("mode", MODES)
async def test_a_span_of_a_completion_models_client_is_a_child_of_the_call(
    mode: Mode, instrumented: InMemorySpanExporter
) -> None:
    class Client(FakeListLLM):
        def _call(self, *args: Any, **kwargs: Any) -> str:
            with TRACER.start_as_current_span("POST"):
                return "Seven."

        async def _acall(self, *args: Any, **kwargs: Any) -> str:
            return self._call()

    await mode(Client(responses=[]), "hello", {})

    assert tree(instrumented.get_finished_spans()) == "text_completion\n  POST"
    assert not current().is_valid


async def test_a_cancelled_completion_ends_with_its_type(instrumented: InMemorySpanExporter) -> None:
    class Slow(FakeListLLM):
        async def _acall(self, *args: Any, **kwargs: Any) -> str:
            await asyncio.sleep(60)
            return "Seven."

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await Slow(responses=[]).ainvoke("hello")

    found = attributes(only(instrumented.get_finished_spans(), "text_completion"))
    assert found["error.type"] == "CancelledError"


@pytest.mark.parametrize("mode", MODES)
async def test_a_span_opened_in_a_tool_belongs_to_its_trace(mode: Mode, instrumented: InMemorySpanExporter) -> None:
    await mode(STOCK, {"item": "mug"}, {})

    assert tree(instrumented.get_finished_spans()) == "execute_tool stock\n  look into the database"


async def test_events_of_a_graph_make_the_same_tree(instrumented: InMemorySpanExporter, make_model: MakeModel) -> None:
    async for _ in two_roles(make_model()).astream_events(QUESTION, version="v2"):
        assert not current().is_valid

    assert tree(instrumented.get_finished_spans()) == GOLDEN


@pytest.mark.parametrize("mode", MODES)
async def test_a_span_around_the_run_is_its_parent_and_current_again_after_it(
    mode: Mode, instrumented: InMemorySpanExporter, make_model: MakeModel
) -> None:
    with TRACER.start_as_current_span("around") as around:
        await mode(two_roles(make_model()), QUESTION, {})
        assert current() == around.get_span_context()
        with TRACER.start_as_current_span("after"):
            pass

    lines = tree(instrumented.get_finished_spans()).splitlines()
    assert (lines[0], lines[1], lines[-1]) == ("around", "  invoke_workflow LangGraph", "  after")


async def test_a_task_that_makes_many_calls_does_not_pile_up_contexts(instrumented: InMemorySpanExporter) -> None:
    model = FakeListChatModel(responses=["Seven."])

    for _ in range(1200):  # more than the recursion limit, if each call added a level of indirection
        await model.ainvoke("hello")

    assert not current().is_valid
    assert all(span.parent is None for span in instrumented.get_finished_spans())


async def test_a_role_set_while_a_stream_is_read_stays_set_after_it(
    instrumented: InMemorySpanExporter, make_model: MakeModel
) -> None:
    """The end of a stream must not replace a context that the caller attached later."""
    model = make_model()
    with agl.role("first"):
        items = model.stream("hello")
        next(items)
    with agl.role("second"):
        list(items)
        assert agl.current_role() == "second"
    assert agl.current_role() is None


def test_a_streams_span_is_not_current_in_its_caller(instrumented: InMemorySpanExporter, make_model: MakeModel) -> None:
    for _ in two_roles(make_model()).stream(QUESTION):
        assert not current().is_valid
    for _ in make_model().stream("hello"):
        assert not current().is_valid


def test_interleaved_streams_are_separate_traces(instrumented: InMemorySpanExporter, make_model: MakeModel) -> None:
    agent, model = two_roles(make_model()), make_model()

    for _ in zip(agent.stream(QUESTION), agent.stream(QUESTION), strict=True):
        pass
    for _ in zip(model.stream("a"), model.stream("b"), strict=True):
        pass

    spans = instrumented.get_finished_spans()
    graphs = named(spans, "invoke_workflow LangGraph")
    assert len(graphs) == 2 and [span.parent for span in graphs] == [None, None]
    assert len([span for span in named(spans, "chat tiny") if span.parent is None]) == 2


async def test_an_abandoned_stream_ends_its_spans_and_leaves_none_current(
    instrumented: InMemorySpanExporter, make_model: MakeModel
) -> None:
    model = make_model()

    async for _ in model.astream("hello"):
        break
    assert not current().is_valid
    for chunk in model.stream("hello"):
        if chunk.content:
            break
    assert not current().is_valid
    stream = two_roles(model).astream(QUESTION, stream_mode="messages")
    await anext(stream)
    await stream.aclose()
    await asyncio.sleep(0.05)  # the event loop closes the first stream

    spans = instrumented.get_finished_spans()
    broken = named(spans, "chat tiny")
    assert [attributes(span).get("error.type") for span in broken[:2]] == ["GeneratorExit", "GeneratorExit"]
    assert all(span.status.status_code is trace.StatusCode.ERROR for span in broken[:2])
    assert '"parts":[{"type":"text","content":"Seven"}]' in str(attributes(broken[1])["gen_ai.output.messages"])
    assert attributes(only(spans, "invoke_workflow LangGraph"))["error.type"] in ("GeneratorExit", "CancelledError")


async def test_a_timeout_in_the_callers_own_task_leaves_nothing_open_or_current(
    instrumented: InMemorySpanExporter, make_model: MakeModel
) -> None:
    """LangChain does not report the end of a cancelled model call."""
    model = make_model()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await model.ainvoke("SLOW")

    assert len(OPEN_RUNS) == 0 and not current().is_valid
    assert attributes(only(instrumented.get_finished_spans(), "chat tiny"))["error.type"] == "CancelledError"


def test_the_chains_span_is_current_inside_a_generator(instrumented: InMemorySpanExporter) -> None:
    def shout(words: Iterator[str]) -> Iterator[str]:
        for word in words:
            with TRACER.start_as_current_span("shout"):
                yield word.upper()

    assert list(RunnableGenerator(shout).with_config(run_name="shouter").stream("mug")) == ["MUG"]

    assert tree(instrumented.get_finished_spans()) == "invoke_workflow shouter\n  shout"


def test_a_thread_without_a_copied_context_keeps_the_rollout(
    instrumented: InMemorySpanExporter, make_model: MakeModel
) -> None:
    model = make_model()

    def fan_out(_: Any, config: RunnableConfig) -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda question: model.invoke(question, config), ["one", "two"]))

    with agl.rollout("r1"):
        RunnableLambda(fan_out).with_config(run_name="fan out").invoke(None)

    spans = instrumented.get_finished_spans()
    assert tree(spans) == "agl.rollout\n  invoke_workflow fan out\n    chat tiny\n    chat tiny"
    assert {attributes(span)["agl.rollout.id"] for span in spans} == {"r1"}


def test_a_run_with_its_own_callbacks_is_a_child_of_the_run_around_it(spans: InMemorySpanExporter) -> None:
    model = FakeListChatModel(responses=["Seven."])
    handler = AglCallbackHandler()

    def ask(_: Any) -> Any:
        return model.invoke("How many?", {"callbacks": [handler]})

    RunnableLambda(ask).with_config(run_name="asker").invoke(None, {"callbacks": [handler]})

    assert tree(spans.get_finished_spans()) == "invoke_workflow asker\n  chat"


def test_code_in_a_run_may_read_and_write_the_current_span(instrumented: InMemorySpanExporter) -> None:
    def note(_: Any) -> None:
        span = trace.get_current_span()
        span.set_attribute("shop", "mugs")
        span.add_event("opened")
        span.end()  # has no effect
        assert span.is_recording()
        assert span.attributes["shop"] == "mugs"  # type: ignore[attr-defined]

    RunnableLambda(note).invoke(None)

    span = only(instrumented.get_finished_spans(), "invoke_workflow note")
    assert attributes(span)["shop"] == "mugs" and [event.name for event in span.events] == ["opened"]


async def test_nothing_fails_to_detach(
    instrumented: InMemorySpanExporter, make_model: MakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="opentelemetry")
    model = make_model()
    for mode in MODES:
        await mode(model, "hello", {})
        await mode(two_roles(model), QUESTION, {})

    assert "Failed to detach context" not in caplog.text
