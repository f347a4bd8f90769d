"""`instrument` and `uninstrument`, and one span per run with any number of handlers."""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import AsyncCallbackManager
from langchain_core.language_models import BaseLLM, FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers import context
from langchain_openai.chat_models.base import BaseChatOpenAI
from langchain_openai.llms.base import BaseOpenAI
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agl_langchain import AglCallbackHandler, LangChainInstrumentor
from tests.autogen.span_tree import attributes, only, tree
from tests.langchain.agents import two_roles
from tests.langchain.conftest import MakeModel
from tests.langchain.modes import EVERY_MODE, Mode
from tests.langchain.test_tree import GOLDEN, QUESTION


def state() -> list[Any]:
    """Everything that the instrumentor changes in the framework."""
    classes = (BaseChatOpenAI, BaseOpenAI, BaseLLM, AsyncCallbackManager)
    return [list(context._configure_hooks), *(dict(vars(owner)) for owner in classes)]


def test_a_patch_that_fails_undoes_the_earlier_ones(
    spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later version of the framework may lack a method; it must not be left half patched."""
    monkeypatch.delattr(BaseChatOpenAI, "_convert_chunk_to_generation_chunk")
    before = state()

    with pytest.raises(AttributeError, match="_convert_chunk_to_generation_chunk"):
        LangChainInstrumentor().instrument()

    assert state() == before
    monkeypatch.undo()
    LangChainInstrumentor().instrument()
    assert all(now != was for now, was in zip(state(), before, strict=True))
    LangChainInstrumentor().uninstrument()


def test_uninstrument_leaves_the_framework_exactly_as_it_was(spans: InMemorySpanExporter) -> None:
    before = state()
    instrumentor = LangChainInstrumentor()

    for _ in range(2):
        instrumentor.instrument()
        assert all(now != was for now, was in zip(state(), before, strict=True))
        instrumentor.uninstrument()
        assert state() == before

    FakeListChatModel(responses=["Seven."]).invoke("hello")
    assert spans.get_finished_spans() == ()


def test_explicit_handlers_with_the_instrumentor_record_each_span_once(
    instrumented: InMemorySpanExporter, make_model: MakeModel
) -> None:
    model = make_model(callbacks=[AglCallbackHandler()])

    two_roles(model).invoke(QUESTION, {"callbacks": [AglCallbackHandler(), AglCallbackHandler()]})

    assert tree(instrumented.get_finished_spans()) == GOLDEN


def test_a_running_chain_ends_its_spans_after_uninstrument(spans: InMemorySpanExporter) -> None:
    instrumentor = LangChainInstrumentor()
    instrumentor.instrument()

    RunnableLambda(lambda _: instrumentor.uninstrument(), name="last").invoke(None)

    assert tree(spans.get_finished_spans()) == "invoke_workflow last"


def test_instrument_takes_the_handlers_arguments(spans: InMemorySpanExporter) -> None:
    private = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(private))
    instrumentor = LangChainInstrumentor()
    instrumentor.instrument(tracer_provider=provider, roles={"writer": "write"}, capture_content=False)
    model = FakeListChatModel(responses=["Seven."])

    RunnableLambda(lambda _: model.invoke("hello"), name="write").invoke(None)
    instrumentor.uninstrument()

    found = attributes(only(private.get_finished_spans(), "chat"))
    assert found["agl.role"] == "writer" and "gen_ai.input.messages" not in found
    assert spans.get_finished_spans() == ()


def test_opentelemetry_instrument_finds_it() -> None:
    (point,) = entry_points(group="opentelemetry_instrumentor", name="agl_langchain")

    assert point.load() is LangChainInstrumentor


def test_the_tracer_is_named_after_the_package(instrumented: InMemorySpanExporter) -> None:
    FakeListChatModel(responses=["Seven."]).invoke("hello")

    scope = only(instrumented.get_finished_spans(), "chat").instrumentation_scope
    assert scope is not None and (scope.name, scope.version) == ("agl_langchain", "0.1.0")


@pytest.mark.parametrize(("disabled", "instruments"), [("", True), ("agl_langchain", False)])
def test_opentelemetry_instrument_respects_disabled_instrumentations(disabled: str, instruments: bool) -> None:
    code = "import agl_langchain; print(agl_langchain.LangChainInstrumentor().is_instrumented_by_opentelemetry)"
    launcher = Path(sys.executable).with_name("opentelemetry-instrument")
    environment = {**os.environ, "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": disabled}

    done = subprocess.run(
        [launcher, sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )

    assert done.stdout.strip() == str(instruments)


@pytest.mark.parametrize("mode", EVERY_MODE)
async def test_a_suppressed_run_has_no_span_and_later_runs_do(mode: Mode, instrumented: InMemorySpanExporter) -> None:
    model = FakeListChatModel(responses=["Seven."])

    with suppress_instrumentation():
        await mode(model | StrOutputParser(), "hello", {})
    assert instrumented.get_finished_spans() == ()
    await mode(model, "hello", {})

    assert tree(instrumented.get_finished_spans()) == "chat"
