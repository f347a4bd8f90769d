"""One clock for the spans of a rollout: hosts disagree on the time, and order decides what is trained.

Within a process order is that of its clock. Between processes a span tells of the other's clock: a child does not
begin before its parent, and what its parent waits for (the server's side of a request, a gateway's call) ends before
it. The clock of a process is moved as little as makes that so for all its spans alike, which keeps their own order.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from agl import semconv
from agl.span import AttributeValue, Span

Clock = tuple[AttributeValue | None, ...]
"""What tells processes apart. A gateway's spans name no service: all gateways count as one."""

_SERVER_KIND = 2
_PROCESS = ("service.name", "service.instance.id", "host.name")


@dataclass(slots=True)
class _Bounds:
    """By how many nanoseconds a clock may be moved, as seen from another."""

    least: float = -math.inf
    most: float = math.inf

    @property
    def nearest_to_none(self) -> int:
        """That a cause comes first counts most, where both cannot be."""
        return int(max(self.least, min(self.most, 0)))


def in_one_clock(spans: Sequence[Span]) -> list[Span]:
    """`spans`, with the times of other processes moved to the clock of the process that began the rollout."""
    if len({_clock(span) for span in spans}) < 2:
        return list(spans)
    edges = list(_edges(spans))
    offsets = _offsets(edges, _first_clock(spans, edges))
    return [_moved(span, offsets.get(_clock(span), 0)) for span in spans]


def _edges(spans: Sequence[Span]) -> Iterator[tuple[Span, Span]]:
    """Each span after the one that caused it, by parentage or as the answer to its request."""
    by_key = {(span.trace_id, span.span_id): span for span in spans}
    asked = {span.response_id: span for span in spans if span.name != semconv.SPAN_GATEWAY_CALL and span.response_id}
    for span in spans:
        above = by_key.get((span.trace_id, span.parent_id or ""))
        if above is None and span.name == semconv.SPAN_GATEWAY_CALL:
            above = asked.get(span.response_id or "")
        if above is not None:
            yield above, span


def _first_clock(spans: Sequence[Span], edges: Sequence[tuple[Span, Span]]) -> Clock:
    """That of a span that nothing caused: the rollout's own, where it is there."""
    caused = {id(below) for _, below in edges}
    roots = [span for span in spans if id(span) not in caused] or list(spans)
    return _clock(next((span for span in roots if span.name == semconv.SPAN_ROLLOUT), roots[0]))


def _offsets(edges: Sequence[tuple[Span, Span]], first: Clock) -> dict[Clock, int]:
    """What to add to the times of each clock that can be reached from the first."""
    bounds: dict[tuple[Clock, Clock], _Bounds] = {}
    for above, below in edges:
        if _clock(above) != _clock(below):
            _tighten(bounds.setdefault((_clock(above), _clock(below)), _Bounds()), above, below)
    offsets, reached = {first: 0}, [first]
    for clock in reached:
        for (above, below), bound in bounds.items():
            if above == clock and below not in offsets:
                offsets[below] = offsets[clock] + bound.nearest_to_none
                reached.append(below)
    return offsets


def _tighten(bounds: _Bounds, above: Span, below: Span) -> None:
    bounds.least = max(bounds.least, above.start_ns - below.start_ns)
    if below.kind == _SERVER_KIND or below.name == semconv.SPAN_GATEWAY_CALL:
        bounds.most = min(bounds.most, above.end_ns - below.end_ns)


def _moved(span: Span, by_ns: int) -> Span:
    return replace(span, start_ns=span.start_ns + by_ns, end_ns=span.end_ns + by_ns) if by_ns else span


def _clock(span: Span) -> Clock:
    return tuple(span.resource.get(name) for name in _PROCESS)
