"""Shared by the agents: OpenTelemetry's own exporter, and a span around the run that has the reward.

With `$ROLLOUT` they run in `agl.rollout`; without it they import nothing of ours. With `$STREAMING` they stream.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

QUESTION = "How many mugs?"
STREAMING = "STREAMING" in os.environ


@contextmanager
def exporting() -> Iterator[None]:
    provider = TracerProvider()
    if "ROLLOUT" in os.environ:
        from agl.context import RolloutProcessor

        provider.add_span_processor(RolloutProcessor())
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    yield
    provider.shutdown()


@contextmanager
def rewarded() -> Iterator[None]:
    """Run the block in a span that has its reward."""
    with _rollout(), trace.get_tracer("agent").start_as_current_span("run") as span:
        yield
        span.set_attribute("agl.reward.value", 0.5)


def _rollout() -> AbstractContextManager[object]:
    if "ROLLOUT" not in os.environ:
        return nullcontext()
    import agl

    return agl.rollout(os.environ["ROLLOUT"])
