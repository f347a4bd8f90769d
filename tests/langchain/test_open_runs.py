"""Open runs are bounded, and failures of telemetry do not reach the agent."""

import asyncio
import gc
import logging
from uuid import uuid4

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage
from opentelemetry import trace
from opentelemetry.context import get_current
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agl.content.filter import ContentFilter
from agl_langchain import AglCallbackHandler
from agl_langchain._role import Actor
from agl_langchain._run import OPEN_RUNS, OpenRuns, Run
from tests.autogen.span_tree import attributes, only


def start(runs: OpenRuns, name: str) -> Run:
    span = trace.get_tracer("test").start_span(name)
    run = Run(uuid4(), span, Actor(), None, True, get_current(), get_current(), ContentFilter())
    runs.add(run.run_id, run)
    return run


def test_beyond_the_limit_the_oldest_run_is_abandoned(spans: InMemorySpanExporter) -> None:
    runs = OpenRuns(max_open=2)
    first, second, third = (start(runs, name) for name in ("first", "second", "third"))

    assert len(runs) == 2 and runs.pop(first.run_id) is None
    assert runs.pop(second.run_id) is second and runs.pop(third.run_id) is third
    given_up = only(spans.get_finished_spans(), "first")
    assert attributes(given_up) == {"error.type": "abandoned"}
    assert given_up.status.status_code is trace.StatusCode.ERROR


def test_a_run_open_for_too_long_is_abandoned_when_the_next_one_starts(spans: InMemorySpanExporter) -> None:
    runs = OpenRuns(max_seconds=60)
    old = start(runs, "old")
    old.started -= 61

    young = start(runs, "young")

    assert old.run_id not in runs and young.run_id in runs
    assert attributes(only(spans.get_finished_spans(), "old"))["error.type"] == "abandoned"


def test_dropping_a_run_without_a_span_does_not_end_its_parent(spans: InMemorySpanExporter) -> None:
    runs = OpenRuns(max_open=2)
    run = start(runs, "node")
    hidden = uuid4()
    runs.add(hidden, run)
    assert runs.get(hidden) is run and runs.pop(hidden) is None

    assert run.span.is_recording() and runs.pop(run.run_id) is run


def test_a_span_whose_description_fails_still_ends(
    spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(FakeListChatModel):
        """A model that accepts a message whose content cannot be converted."""

        def _call(self, *args: object, **kwargs: object) -> str:
            return "Seven."

    broken = AIMessage("x")
    object.__setattr__(broken, "content", 7)

    answer = Broken(responses=["x"]).invoke([HumanMessage("hello"), broken], {"callbacks": [AglCallbackHandler()]})

    assert answer.content == "Seven."
    assert len(OPEN_RUNS) == 0
    assert [record.message for record in caplog.records] == ["LangChain's on_chat_model_start was not recorded"]
    assert "gen_ai.output.messages" in attributes(only(spans.get_finished_spans(), "chat"))
    caplog.clear()


def test_an_end_without_a_start_is_ignored(spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    handler = AglCallbackHandler()

    handler.on_chain_end({}, run_id=uuid4())
    handler.on_llm_new_token("x", run_id=uuid4())

    assert caplog.records == [] and spans.get_finished_spans() == ()


async def test_a_run_that_has_ended_is_freed_without_the_garbage_collector(spans: InMemorySpanExporter) -> None:
    """A long-running server should not need the garbage collector for runs."""
    model = FakeListChatModel(responses=["Seven."])
    handler = AglCallbackHandler()
    gc.collect()
    gc.disable()
    try:
        model.invoke("hello", {"callbacks": [handler]})
        await asyncio.create_task(model.ainvoke("hello", {"callbacks": [handler]}))
        await asyncio.sleep(0)  # so that the loop drops its reference to the task
        left = [held for held in gc.get_objects() if isinstance(held, Run)]
    finally:
        gc.enable()

    assert left == []
