"""Recorded spans, read in the same way for every instrumentation."""

import gc
from collections.abc import Iterator, Sequence
from weakref import WeakSet

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor

from agl.tokens.packing import pack_ids

_KIND_ATTRIBUTES = (
    "gen_ai.operation.name",
    "openinference.span.kind",
    "traceloop.span.kind",
    "langfuse.observation.type",
)
_CALL_KINDS = {"chat", "text_completion", "completion", "llm", "generation"}
_TOOL_KINDS = {"execute_tool", "tool"}
_RETRIEVAL_KINDS = {"retrieval", "retriever", "vector_db_retrieve"}


USER = "the user's own"
"""Tracer of the spans that the agents' own code opens."""


class Recording(SpanProcessor):
    """Counts the started spans and keeps the ended ones, ordered by start time."""

    def __init__(self) -> None:
        self.started = 0
        self._ended: list[ReadableSpan] = []
        self._alive: WeakSet[Span] = WeakSet()

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        self.started += 1
        self._alive.add(span)

    def on_end(self, span: ReadableSpan) -> None:
        self._ended.append(span)

    def clear(self) -> None:
        self.started = 0
        self._ended.clear()
        self._alive.clear()

    def held(self) -> int:
        """Number of spans that are still referenced."""
        gc.collect()
        return len(self._alive)

    @property
    def open(self) -> int:
        return self.started - len(self._ended)

    @property
    def ended(self) -> list[ReadableSpan]:
        return sorted(self._ended, key=lambda span: span.start_time or 0)

    @property
    def calls(self) -> list[ReadableSpan]:
        """Model calls."""
        return [span for span in self.ended if is_call(span)]

    @property
    def tools(self) -> list[ReadableSpan]:
        return [span for span in self.ended if _kinds(span) & _TOOL_KINDS]

    @property
    def retrievals(self) -> list[ReadableSpan]:
        return [span for span in self.ended if _kinds(span) & _RETRIEVAL_KINDS]

    @property
    def roots(self) -> list[ReadableSpan]:
        """Spans of the instrumentation whose parent is missing or not recorded."""
        ids = {span.context.span_id for span in self._ended}
        return [span for span in self._of_instrumentation() if span.parent is None or span.parent.span_id not in ids]

    @property
    def traces(self) -> set[int]:
        """Trace ids of the instrumentation's spans."""
        return {span.context.trace_id for span in self._of_instrumentation()}

    def _of_instrumentation(self) -> list[ReadableSpan]:
        return [
            span for span in self.ended if not (span.instrumentation_scope and span.instrumentation_scope.name == USER)
        ]

    def named(self, word: str) -> list[ReadableSpan]:
        """Spans with `word` in their name."""
        return [span for span in self.ended if word in span.name]

    def above(self, span: ReadableSpan) -> list[ReadableSpan]:
        """The ancestors of the span, its parent first."""
        return list(self._above(span))

    def _above(self, span: ReadableSpan) -> Iterator[ReadableSpan]:
        by_id = {one.context.span_id: one for one in self._ended}
        while span.parent is not None and (parent := by_id.get(span.parent.span_id)) is not None:
            yield parent
            span = parent


def is_call(span: ReadableSpan) -> bool:
    return bool(_kinds(span) & _CALL_KINDS)


def is_error(span: ReadableSpan) -> bool:
    return span.status.status_code is trace.StatusCode.ERROR


def has_ids(span: ReadableSpan, ids: Sequence[int]) -> bool:
    """Whether an attribute of the span has these token ids, packed or as text."""
    packed = pack_ids(ids)
    return any(value == packed for value in (span.attributes or {}).values()) or says(span, str(list(ids))[1:-1])


def says(span: ReadableSpan, text: str) -> bool:
    """Whether an attribute of the span contains `text`."""
    return any(text in str(value) for value in (span.attributes or {}).values())


def _kinds(span: ReadableSpan) -> set[str]:
    attributes = span.attributes or {}
    return {str(attributes[name]).lower() for name in _KIND_ATTRIBUTES if name in attributes}
