"""Short spans for the tests of the store."""

from typing import Any

from agl import semconv
from agl.span import Span

TRACE = "0af7651916cd43dd8448eb211c80319c"
OTHER_TRACE = "1bf7651916cd43dd8448eb211c80319c"


def make_span(
    number: int,
    *,
    trace: str = TRACE,
    rollout: str | None = None,
    attempt: str | None = None,
    start_ns: int = 0,
    **attributes: Any,
) -> Span:
    named = {semconv.ROLLOUT_ID: rollout, semconv.ATTEMPT_ID: attempt} | attributes
    present = {name: value for name, value in named.items() if value is not None}
    return Span(trace, f"{number:016x}", None, f"span {number}", start_ns, start_ns + 1, present)


def asked(number: int, response_id: str, *, name: str = "chat", rollout: str | None = None, **more: Any) -> Span:
    """A framework's span of a request, by the conventions of OpenTelemetry."""
    trace, parent, start_ns = more.get("trace", TRACE), more.get("parent"), more.get("start_ns", 0)
    attributes = {semconv.GEN_AI_RESPONSE_ID: response_id} | ({semconv.ROLLOUT_ID: rollout} if rollout else {})
    return Span(trace, f"{number:016x}", parent, name, start_ns, start_ns + 1, attributes)


def answered(number: int, response_id: str, **more: Any) -> Span:
    """A gateway call whose request had no `traceparent`: it is in a trace of its own."""
    return asked(number, response_id, **{"trace": f"{number:032x}"} | more, name=semconv.SPAN_GATEWAY_CALL)


def numbers(spans: list[Span]) -> list[int]:
    """The numbers that `make_span` got, sorted."""
    return sorted(int(span.span_id, 16) for span in spans)
