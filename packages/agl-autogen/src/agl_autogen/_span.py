"""A span over a block that is not current in it, so that it can outlive a generator's step."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.util.types import AttributeValue

from agl import semconv
from agl.boundary import never_raises
from agl.context import mark_error


@contextmanager
def open_span(
    tracer: trace.Tracer, name: str, kind: trace.SpanKind, attributes: Mapping[str, AttributeValue]
) -> Iterator[trace.Span]:
    """Start a span before the block and end it after, whatever happens; an exception marks it and goes on."""
    span = trace.NoOpTracer().start_span(name)
    with never_raises(f"no span {name!r}"):
        span = tracer.start_span(name, kind=kind, attributes=dict(attributes))
    try:
        yield span
    except GeneratorExit:  # whether a reader who closes a generator misses anything, only the block knows
        raise
    except BaseException as error:
        mark_error(span, error)
        raise
    finally:
        with never_raises(f"span {name!r} was not ended"):
            span.end()


def mark_abandoned(span: trace.Span) -> None:
    """Give `span` the status error: the reader of a stream went away before its end."""
    with never_raises("an abandoned stream was not marked"):
        span.set_attribute(semconv.ERROR_TYPE, "abandoned")
        span.set_status(trace.StatusCode.ERROR, "the caller closed the stream before its end")
