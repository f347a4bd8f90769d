"""What the agents share: spans leave by OpenTelemetry's own exporter, and the span around the run has the reward.

`$ROLLOUT` runs them in `agl.rollout`; without it they know nothing of us. `$STREAMING` lets them stream.
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
    """The run, of which a span says what it was worth."""
    with _rollout(), trace.get_tracer("agent").start_as_current_span("run") as span:
        yield
        span.set_attribute("agl.reward.value", 0.5)


def _rollout() -> AbstractContextManager[object]:
    if "ROLLOUT" not in os.environ:
        return nullcontext()
    import agl

    return agl.rollout(os.environ["ROLLOUT"])
