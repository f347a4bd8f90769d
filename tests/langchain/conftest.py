"""LangChain and ChatOpenAI with a real loopback server in a separate thread, and finished spans in memory."""

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal
from langchain_openai import ChatOpenAI
from openai import DefaultAsyncHttpxClient, DefaultHttpxClient
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agl_langchain import LangChainInstrumentor
from agl_langchain._run import OPEN_RUNS
from tests.vllm_server import FakeVllmServer, running_server

MakeModel = Callable[..., ChatOpenAI]


@pytest.fixture
def spans(memory: InMemorySpanExporter, caplog: pytest.LogCaptureFixture) -> Iterator[InMemorySpanExporter]:
    """Finished spans of the test. At its end no run is open or current, and no warning was logged."""
    memory.clear()
    yield memory
    memory.clear()
    assert len(OPEN_RUNS) == 0
    assert not trace.get_current_span().get_span_context().is_valid
    assert complaints(caplog) == []


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Logged warnings and errors, without those of the server, whose clients may disconnect."""
    records = [record for record in caplog.get_records("call") if not record.name.startswith("aiohttp")]
    return [record.getMessage() for record in records if record.levelno >= logging.WARNING]


@pytest.fixture
def instrumented(spans: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    """Finished spans of the test, with every LangChain run traced."""
    instrumentor = LangChainInstrumentor()
    instrumentor.instrument()
    yield spans
    instrumentor.uninstrument()


@pytest.fixture
def server() -> Iterator[FakeVllmServer]:
    """In a separate thread, because a synchronous agent blocks the test's event loop."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(running_server()) as server:
        yield server


@pytest.fixture
async def make_model(server: FakeVllmServer) -> AsyncIterator[MakeModel]:
    """Makes chat models of the server and closes them after the test: `make_model("tiny", temperature=0.5)`."""
    made: list[ChatOpenAI] = []

    def make(model: str = "tiny", **options: Any) -> ChatOpenAI:
        # Separate clients: LangChain caches them by base URL, and a later server may get the same port.
        clients = {"http_client": DefaultHttpxClient(), "http_async_client": DefaultAsyncHttpxClient()}
        options = {"base_url": server.base_url, "api_key": "none", "max_retries": 0} | clients | options
        made.append(ChatOpenAI(model=model, **options))
        return made[-1]

    yield make
    for model in made:
        model.root_client.close()
        await model.root_async_client.close()
