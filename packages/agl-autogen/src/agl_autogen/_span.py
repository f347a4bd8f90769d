"""Spans around a block: ours, which are not made current, and AutoGen's, which are."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager

from opentelemetry import trace
from opentelemetry.util.types import AttributeValue

from agl import semconv
from agl.content.filter import ContentFilter
from agl.failsafe import never_raises
from agl.span import now_ns
from agl_autogen._settings import Settings


@contextmanager
def open_span(
    settings: Settings, name: str, kind: trace.SpanKind, attributes: Mapping[str, AttributeValue]
) -> Iterator[trace.Span]:
    """Start a span before the block and end it after, in every case. An exception is recorded and propagates.

    The span is not made current, because the block may be the body of a generator.
    """
    span = trace.INVALID_SPAN
    with never_raises(f"no span {name!r}"):
        span = settings.tracer.start_span(name, kind=kind, attributes=dict(attributes), start_time=now_ns())
    try:
        yield span
    except GeneratorExit:  # only the block knows whether closing its generator is an error
        raise
    except BaseException as error:
        settings.content.mark_error(span, error)
        raise
    finally:
        with never_raises(f"span {name!r} was not ended"):
            span.end(now_ns())


@contextmanager
def with_error_marked(opened: AbstractContextManager[trace.Span], content: ContentFilter) -> Iterator[trace.Span]:
    """AutoGen's span around the block, with an exception recorded as on our spans.

    AutoGen itself would record an exception twice, unredacted, and a cancellation not at all.
    """
    with ExitStack() as stack:
        span = stack.enter_context(opened)
        try:
            yield span
        except GeneratorExit:
            raise
        except BaseException as error:
            content.mark_error(span, error)
            stack.close()  # ends AutoGen's span before AutoGen sees the exception
            raise


def mark_abandoned(span: trace.Span) -> None:
    """Set the status ERROR on `span`: the caller closed a stream before its end."""
    with never_raises("an abandoned stream was not marked"):
        span.set_attribute(semconv.ERROR_TYPE, "abandoned")
        span.set_status(trace.StatusCode.ERROR, "the caller closed the stream before its end")
