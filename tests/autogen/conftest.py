"""Instrumented AutoGen with a real server on loopback, and finished spans in memory."""

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from autogen_core.models import ModelInfo
from autogen_ext.models.openai import OpenAIChatCompletionClient
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agl_autogen import AutoGenInstrumentor
from tests.vllm_server import FakeVllmServer, running_server

MODEL_INFO: ModelInfo = {
    "vision": False,
    "function_calling": True,
    "json_output": False,
    "family": "unknown",
    "structured_output": False,
}

MakeClient = Callable[..., OpenAIChatCompletionClient]
SwitchOn = Callable[..., None]


@pytest.fixture
def spans(memory: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    """Finished spans of the test, with AutoGen instrumented."""
    instrumentor = AutoGenInstrumentor()
    instrumentor.instrument()
    memory.clear()
    yield memory
    instrumentor.uninstrument()
    memory.clear()


@pytest.fixture
def switch_on(spans: InMemorySpanExporter) -> SwitchOn:
    """Instruments AutoGen again with options: `switch_on(roles={"writer": "w.*"})`."""

    def switch(**options: Any) -> None:
        AutoGenInstrumentor().uninstrument()
        AutoGenInstrumentor().instrument(**options)

    return switch


@pytest.fixture
async def server() -> AsyncIterator[FakeVllmServer]:
    async with running_server() as server:
        yield server


@pytest.fixture
async def client(server: FakeVllmServer) -> AsyncIterator[MakeClient]:
    """Makes clients of the server and closes them after the test: `client("planner", temperature=0.5)`."""
    made: list[OpenAIChatCompletionClient] = []

    def make(model: str, **options: Any) -> OpenAIChatCompletionClient:
        options = {"base_url": server.base_url, "api_key": "none", "model_info": MODEL_INFO, "max_retries": 0} | options
        made.append(OpenAIChatCompletionClient(model=model, **options))
        return made[-1]

    yield make
    for one in made:
        await one.close()
