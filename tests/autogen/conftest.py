"""Real AutoGen, instrumented, against a real loopback server; finished spans in memory."""

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from autogen_core.models import ModelInfo
from autogen_ext.models.openai import OpenAIChatCompletionClient
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agl.context import RolloutProcessor
from agl_autogen import AutoGenInstrumentor
from tests.autogen.vllm_server import VllmServer, running_server

MODEL_INFO: ModelInfo = {
    "vision": False,
    "function_calling": True,
    "json_output": False,
    "family": "unknown",
    "structured_output": False,
}

MakeClient = Callable[..., OpenAIChatCompletionClient]


@pytest.fixture(scope="session")
def exporter() -> InMemorySpanExporter:
    """AutoGen's own spans go to the global provider, which a process sets once."""
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        trace.set_tracer_provider(TracerProvider())
    provider = trace.get_tracer_provider()
    assert isinstance(provider, TracerProvider)
    exporter = InMemorySpanExporter()
    provider.add_span_processor(RolloutProcessor())
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


@pytest.fixture
def spans(exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """AutoGen instrumented; its message bus silent."""
    monkeypatch.setenv("AUTOGEN_DISABLE_RUNTIME_TRACING", "true")
    instrumentor = AutoGenInstrumentor()
    instrumentor.instrument()
    exporter.clear()
    yield exporter
    instrumentor.uninstrument()
    exporter.clear()


@pytest.fixture
async def server() -> AsyncIterator[VllmServer]:
    async with running_server() as server:
        yield server


@pytest.fixture
async def client(server: VllmServer) -> AsyncIterator[MakeClient]:
    """Makes clients of the server, closed after the test: `client("planner", temperature=0.5)`."""
    made: list[OpenAIChatCompletionClient] = []

    def make(model: str, **options: Any) -> OpenAIChatCompletionClient:
        options = {"base_url": server.base_url, "api_key": "none", "model_info": MODEL_INFO, "max_retries": 0} | options
        made.append(OpenAIChatCompletionClient(model=model, **options))
        return made[-1]

    yield make
    for one in made:
        await one.close()
