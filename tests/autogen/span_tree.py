"""Finished spans as text, to compare with an expected tree."""

from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


def named(spans: Sequence[ReadableSpan], name: str) -> list[ReadableSpan]:
    """The spans `name`, by start time."""
    return sorted((span for span in spans if span.name == name), key=lambda span: span.start_time or 0)


def only(spans: Sequence[ReadableSpan], name: str) -> ReadableSpan:
    found = named(spans, name)
    assert len(found) == 1, [span.name for span in spans]
    return found[0]


def tree(spans: Sequence[ReadableSpan]) -> str:
    """One line for each span: `<name> [<role>] <status>`, children indented under their parent, by start time."""
    ids = {span.context.span_id for span in spans}
    roots = [span for span in spans if span.parent is None or span.parent.span_id not in ids]
    return "\n".join(line for root in _by_start(roots) for line in _lines(root, spans, 0))


def _lines(span: ReadableSpan, spans: Sequence[ReadableSpan], depth: int) -> list[str]:
    role = attributes(span).get("agl.role")
    words = [span.name, f"[{role}]" if role else "", "" if span.status.is_unset else span.status.status_code.name]
    children = [child for child in spans if child.parent and child.parent.span_id == span.context.span_id]
    below = [line for child in _by_start(children) for line in _lines(child, spans, depth + 1)]
    return ["  " * depth + " ".join(word for word in words if word), *below]


def _by_start(spans: Sequence[ReadableSpan]) -> list[ReadableSpan]:
    return sorted(spans, key=lambda span: span.start_time or 0)
