"""Finished spans in memory, and a collector of the smallest kind."""

from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agl.context import RolloutProcessor
from tests.core.otlp_sink import OtlpSink


@pytest.fixture(scope="session")
def memory() -> InMemorySpanExporter:
    """On the global provider, which a process sets once."""
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        trace.set_tracer_provider(TracerProvider())
    provider = trace.get_tracer_provider()
    assert isinstance(provider, TracerProvider)
    exporter = InMemorySpanExporter()
    provider.add_span_processor(RolloutProcessor())
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


@pytest.fixture
def spans(memory: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    """The spans of this test: `spans.get_finished_spans()`."""
    memory.clear()
    yield memory
    memory.clear()


@pytest.fixture
def sink() -> Iterator[OtlpSink]:
    """A real OTLP/HTTP server on loopback that keeps what it decodes."""
    with OtlpSink() as sink:
        yield sink
