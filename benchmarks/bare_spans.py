"""Lower bound for the cost of a LangChain handler: one empty span per run, under the span of its parent run."""

from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider


class BareSpans(BaseCallbackHandler):
    """Sets no attributes, no current context and no error status. Serves only as a baseline."""

    run_inline = True

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer = provider.get_tracer("bare")
        self._open: dict[UUID, trace.Span] = {}

    def _start(self, *args: Any, run_id: UUID, parent_run_id: UUID | None = None, **event: Any) -> None:
        parent = self._open.get(parent_run_id) if parent_run_id else None
        context = trace.set_span_in_context(parent) if parent else None
        self._open[run_id] = self._tracer.start_span("run", context)

    def _end(self, *args: Any, run_id: UUID, **event: Any) -> None:
        self._open.pop(run_id).end()

    on_chain_start = on_chat_model_start = on_tool_start = _start  # type: ignore[assignment]
    on_chain_end = on_llm_end = on_tool_end = _end  # type: ignore[assignment]
    on_chain_error = on_llm_error = on_tool_error = _end  # type: ignore[assignment]
