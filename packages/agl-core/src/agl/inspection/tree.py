"""The spans of a rollout in the order of a printed tree."""

from collections.abc import Iterator, Mapping

from agl.span import Span
from agl.trajectory import SpanTree

LastSiblings = tuple[bool, ...]
"""One flag for each level down to a span's own: is the ancestor on that level the last of its siblings?"""


def walk(tree: SpanTree, grafts: Mapping[str, str]) -> Iterator[tuple[Span, LastSiblings]]:
    """Every span once, parents first.

    `grafts` maps a root's id to the id of a span in another trace, its parent here. A cycle starts at its first span.
    """
    by_id = {span.span_id: span for span in tree.spans}
    children: dict[int | None, list[Span]] = {}
    for span in tree.spans:
        parent = tree.parent(span) or by_id.get(grafts.get(span.span_id, ""))
        children.setdefault(id(parent) if parent else None, []).append(span)
    seen: set[int] = set()
    for siblings in [children.get(None, []), *([span] for span in tree.spans)]:  # Only cycles are left after the roots.
        stack = _level(siblings, ())  # A loop, not recursion: a tree may be deep.
        while stack:
            span, lasts = stack.pop()
            if id(span) not in seen:
                seen.add(id(span))
                yield span, lasts
                stack.extend(_level(children.get(id(span), []), lasts))


def _level(siblings: list[Span], above: LastSiblings) -> list[tuple[Span, LastSiblings]]:
    """`siblings` with their flags, in reverse as for a stack."""
    return [(span, (*above, span is siblings[-1])) for span in reversed(siblings)]
