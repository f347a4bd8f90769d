"""Spans around a block: ours, which are not current in it, and AutoGen's, which are."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager

from opentelemetry import trace
from opentelemetry.util.types import AttributeValue

from agl import semconv
from agl.content.filter import ContentFilter
from agl.failsafe import never_raises
from agl_autogen._settings import Settings


@contextmanager
def open_span(
    settings: Settings, name: str, kind: trace.SpanKind, attributes: Mapping[str, AttributeValue]
) -> Iterator[trace.Span]:
    """Start a span before the block and end it after, whatever happens; an exception marks it and goes on.

    It is not made current, so that it can outlive a generator's step.
    """
    span = trace.INVALID_SPAN
    with never_raises(f"no span {name!r}"):
        span = settings.tracer.start_span(name, kind=kind, attributes=dict(attributes))
    try:
        yield span
    except GeneratorExit:  # whether a reader who closes a generator misses anything, only the block knows
        raise
    except BaseException as error:
        settings.content.mark_error(span, error)
        raise
    finally:
        with never_raises(f"span {name!r} was not ended"):
            span.end()


@contextmanager
def marked_once(opened: AbstractContextManager[trace.Span], content: ContentFilter) -> Iterator[trace.Span]:
    """AutoGen's span around the block; an exception marks it as it marks ours, and goes on.

    AutoGen would record the exception twice, with all that it says, and a cancellation not at all.
    """
    with ExitStack() as stack:
        span = stack.enter_context(opened)
        try:
            yield span
        except GeneratorExit:
            raise
        except BaseException as error:
            content.mark_error(span, error)
            stack.close()  # AutoGen ends its span, and has not seen the exception
            raise


def mark_abandoned(span: trace.Span) -> None:
    """Give `span` the status error: the reader of a stream went away before its end."""
    with never_raises("an abandoned stream was not marked"):
        span.set_attribute(semconv.ERROR_TYPE, "abandoned")
        span.set_status(trace.StatusCode.ERROR, "the caller closed the stream before its end")
