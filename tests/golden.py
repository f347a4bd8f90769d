"""Span trees as plain JSON, for golden files: names, kinds, statuses, roles, attribute names and types, parents."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan


def described(spans: Sequence[ReadableSpan]) -> list[dict[str, Any]]:
    """The root spans, each with its children, ordered by start time."""
    ids = {span.context.span_id for span in spans}
    return [_node(span, spans) for span in _by_start(spans) if span.parent is None or span.parent.span_id not in ids]


def write(path: Path, tree: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))


def _node(span: ReadableSpan, spans: Sequence[ReadableSpan]) -> dict[str, Any]:
    children = [child for child in _by_start(spans) if child.parent and child.parent.span_id == span.context.span_id]
    return {
        "name": span.name,
        "kind": span.kind.name,
        "status": span.status.status_code.name,
        "role": (span.attributes or {}).get("agl.role"),
        "attributes": {name: _type(value) for name, value in sorted((span.attributes or {}).items())},
        "children": [_node(child, spans) for child in children],
    }


def _type(value: Any) -> str:
    """Name of the value's type: `str`, `int`, ...; `[str]` for an array."""
    return f"[{_type(value[0])}]" if isinstance(value, tuple | list) else type(value).__name__


def _by_start(spans: Sequence[ReadableSpan]) -> list[ReadableSpan]:
    return sorted(spans, key=lambda span: span.start_time or 0)
