"""Corrects clock skew between the processes of a rollout, since the order of its spans decides how they train.

Spans of one process are in the order of its clock. Spans of two processes bound the offset between their clocks: a
span does not start before the span that caused it, and the server's side of a request, such as a gateway call, ends
before the client's. All times of a process are shifted by the one offset nearest to 0 within its bounds, so the order
within a process is kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from agl import semconv
from agl.span import AttributeValue, Span
from agl.trajectory.join import causes

Process = tuple[AttributeValue | None, ...]
"""Resource attributes that identify a process. Gateway spans have none, so all gateways count as one process."""

_SERVER_KIND = 2
_PROCESS_ATTRIBUTES = ("service.name", "service.instance.id", "host.name")


@dataclass(slots=True)
class _Bounds:
    """Bounds on the offset, in ns, from one process's clock to another's."""

    lower: float = -math.inf
    upper: float = math.inf

    @property
    def nearest_to_zero(self) -> int:
        """The offset nearest to 0 within the bounds; if they conflict, the lower one wins."""
        return int(max(self.lower, min(self.upper, 0)))

    def tighten(self, cause: Span, effect: Span) -> None:
        self.lower = max(self.lower, cause.start_ns - effect.start_ns)
        if effect.kind == _SERVER_KIND or effect.name == semconv.SPAN_GATEWAY_CALL:
            self.upper = min(self.upper, cause.end_ns - effect.end_ns)


def in_one_clock(spans: Sequence[Span]) -> list[Span]:
    """`spans` with all times on the clock of the process that started the rollout."""
    if len({_process(span) for span in spans}) < 2:
        return list(spans)
    edges = list(causes(spans))
    offsets = _offsets(edges, _first_process(spans, edges))
    return [_shifted(span, offsets.get(_process(span), 0)) for span in spans]


def _first_process(spans: Sequence[Span], edges: Sequence[tuple[Span, Span]]) -> Process:
    """The process of the rollout's own span, else of the first span that no other span caused."""
    caused = {id(effect) for _, effect in edges}
    roots = [span for span in spans if id(span) not in caused] or list(spans)
    return _process(next((span for span in roots if span.name == semconv.SPAN_ROLLOUT), roots[0]))


def _offsets(edges: Sequence[tuple[Span, Span]], first: Process) -> dict[Process, int]:
    """Nanoseconds to add to the times of each process that a chain of causes links to `first`."""
    bounds: dict[tuple[Process, Process], _Bounds] = {}
    for cause, effect in edges:
        pair = _process(cause), _process(effect)
        if pair[0] != pair[1]:
            bounds.setdefault(pair, _Bounds()).tighten(cause, effect)
    offsets, reached = {first: 0}, [first]
    for process in reached:
        for (cause, effect), bound in bounds.items():
            if cause == process and effect not in offsets:
                offsets[effect] = offsets[process] + bound.nearest_to_zero
                reached.append(effect)
    return offsets


def _shifted(span: Span, by_ns: int) -> Span:
    return replace(span, start_ns=span.start_ns + by_ns, end_ns=span.end_ns + by_ns) if by_ns else span


def _process(span: Span) -> Process:
    return tuple(span.resource.get(name) for name in _PROCESS_ATTRIBUTES)
