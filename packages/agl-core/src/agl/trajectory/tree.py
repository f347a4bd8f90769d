"""Spans by parent, across traces."""

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

from agl.span import Span

Key = tuple[str, str]


class SpanTree:
    """The spans of a rollout as a forest. A span whose parent is not there is a root; a cycle is cut open.

    `grafts` names, by span ids, a parent in another trace for what would be a root.
    """

    def __init__(self, spans: Iterable[Span], grafts: Mapping[str, str] = MappingProxyType({})) -> None:
        self._by_key: dict[Key, Span] = {}
        for span in spans:
            self._by_key.setdefault(_key(span), span)
        self.spans = sorted(self._by_key.values(), key=lambda span: span.start_ns)
        """Every span once, by start time; ties stay in the order given."""
        by_id = {span.span_id: span for span in self.spans}
        self._grafts = {below: by_id[above] for below, above in grafts.items() if above in by_id}
        self._children: dict[Key | None, list[Span]] = {}
        for span in self.spans:
            parent = self.parent(span)
            self._children.setdefault(_key(parent) if parent else None, []).append(span)

    def parent(self, span: Span) -> Span | None:
        above = self._by_key.get((span.trace_id, span.parent_id)) if span.parent_id else None
        return above or self._grafts.get(span.span_id)

    def ancestors(self, span: Span) -> Iterator[Span]:
        """Parents of `span`, the nearest first."""
        seen = {_key(span)}
        above = self.parent(span)
        while above is not None and _key(above) not in seen:
            yield above
            seen.add(_key(above))
            above = self.parent(above)

    def walk(self) -> Iterator[tuple[Span, tuple[bool, ...]]]:
        """Every span once, parents first. Beside it, for each level down to its own: is it the last of its siblings?

        Roots have one level. A loop, not recursion: a tree from outside may be deep.
        """
        seen: set[Key] = set()
        yield from self._walk_from(self._children.get(None, []), seen)
        for span in self.spans:
            if _key(span) not in seen:  # only a cycle is not reached from a root
                yield from self._walk_from([span], seen)

    def _walk_from(self, roots: list[Span], seen: set[Key]) -> Iterator[tuple[Span, tuple[bool, ...]]]:
        stack = _levels(roots, ())
        while stack:
            span, lasts = stack.pop()
            if _key(span) in seen:
                continue
            seen.add(_key(span))
            yield span, lasts
            stack.extend(_levels(self._children.get(_key(span), []), lasts))


def _levels(siblings: list[Span], above: tuple[bool, ...]) -> list[tuple[Span, tuple[bool, ...]]]:
    """`siblings` in reverse, ready for a stack, each with its levels."""
    return [(span, (*above, span is siblings[-1])) for span in reversed(siblings)]


def _key(span: Span) -> Key:
    return span.trace_id, span.span_id
