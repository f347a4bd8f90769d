"""Memory leaks known from other instrumentations of LangChain."""

import gc
import threading
import weakref
from uuid import uuid4

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import HumanMessage
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agl_langchain import AglCallbackHandler
from agl_langchain._run import OPEN_RUNS
from tests.autogen.span_tree import attributes
from tests.langchain.agents import two_roles
from tests.langchain.conftest import MakeModel
from tests.langchain.modes import EVERY_MODE, Mode


@pytest.mark.parametrize("mode", EVERY_MODE)
async def test_ended_runs_are_not_kept_in_a_map_of_spans(
    mode: Mode, instrumented: InMemorySpanExporter, make_model: MakeModel
) -> None:
    """traceloop/openllmetry#2790: each run stayed in the handler's dictionary."""
    await mode(two_roles(make_model()), {"messages": [("user", "How many mugs?")]}, {})

    assert len(instrumented.get_finished_spans()) > 5 and len(OPEN_RUNS) == 0


def test_two_hundred_runs_leave_none_of_their_messages_in_memory(instrumented: InMemorySpanExporter) -> None:
    """langchain-ai/langsmith-sdk#2097: the inputs of agents were never freed."""
    model = FakeListChatModel(responses=["Seven."])
    kept = []
    for number in range(200):
        question = HumanMessage(f"Question {number}")
        kept.append(weakref.ref(question))
        model.invoke([question])
    del question
    gc.collect()

    assert sum(message() is not None for message in kept) == 0


def test_a_handler_for_each_call_leaves_no_handler_and_no_thread(spans: InMemorySpanExporter) -> None:
    """langfuse/langfuse#2974: each handler had its own threads, which referred to it."""
    model = FakeListChatModel(responses=["Seven."])
    threads = threading.active_count()
    kept = []
    for _ in range(100):
        handler = AglCallbackHandler()
        kept.append(weakref.ref(handler))
        model.invoke("How many?", {"callbacks": [handler]})
    del handler
    gc.collect()

    assert sum(reference() is not None for reference in kept) == 0
    assert threading.active_count() == threads


def test_runs_whose_end_is_never_reported_are_abandoned(
    spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LangChain does not report some ends, e.g. of a cancelled model: open runs are bounded in number and age."""
    monkeypatch.setattr(OPEN_RUNS, "_max_open", 10)
    handler = AglCallbackHandler()

    def start() -> None:
        handler.on_chain_start({}, {}, run_id=uuid4(), name="lost", tags=["x"])

    for _ in range(25):
        start()
    assert len(OPEN_RUNS) == 10
    monkeypatch.setattr(OPEN_RUNS, "_max_seconds", -1)
    start()

    assert len(OPEN_RUNS) == 0
    ended = spans.get_finished_spans()
    assert len(ended) == 26 and {attributes(span)["error.type"] for span in ended} == {"abandoned"}
