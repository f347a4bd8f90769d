"""Finished spans in memory, and a minimal collector."""

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.core.otlp_sink import OtlpSink


@pytest.fixture
def spans(memory: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    """The spans of this test: `spans.get_finished_spans()`."""
    memory.clear()
    yield memory
    memory.clear()


@pytest.fixture
def sink() -> Iterator[OtlpSink]:
    """A real OTLP/HTTP server on loopback that keeps the spans it decodes."""
    with OtlpSink() as sink:
        yield sink
