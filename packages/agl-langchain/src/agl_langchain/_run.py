"""The open runs of LangChain, from start event to end event: each with its span, and whether that span is current."""

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from langchain_core.runnables.config import var_child_runnable_config
from opentelemetry import baggage, trace
from opentelemetry.context import Context, attach, create_key, get_current, set_value
from opentelemetry.util.types import AttributeValue

from agl import semconv
from agl.content.filter import ContentFilter
from agl.span import now_ns
from agl_langchain._model_call import Attributes, ModelCall
from agl_langchain._role import Actor

Describe = Callable[[], Attributes]

MAX_OPEN = 50_000
"""Largest number of open runs; beyond it the oldest is abandoned."""
MAX_SECONDS = 24 * 3600
"""Largest age of an open run; an older one is abandoned, because its end was never reported."""

_RUN = create_key("agl_langchain.run")


@dataclass(slots=True, eq=False)
class Run:
    """An open run."""

    run_id: UUID
    span: trace.Span
    actor: Actor
    role: str | None
    is_chain: bool
    outer_context: Context
    """The OpenTelemetry context in which the run was started."""
    context: Context
    """The OpenTelemetry context inside the run."""
    content: ContentFilter
    """Filter of the handler that opened the run, whichever other handlers receive its events."""
    call: ModelCall | None = None
    """Set if the run is a model call."""
    is_over: bool = False
    """Whether the span can no longer be current: the run has ended, or its model has begun to respond."""
    started: float = field(default_factory=time.monotonic)
    _entered: weakref.ref[Context] | None = None
    _tasks: list[asyncio.Task[Any]] = field(default_factory=list)

    def enter(self, *, as_current: bool = True) -> None:
        """Attach the run's context; with `as_current`, its span is the current span of that context."""
        if as_current:
            shown = CurrentSpan(self, trace.get_current_span(self.outer_context))
            self.context = trace.set_span_in_context(shown, self.context)
        self.context = set_value(_RUN, self, self.context)
        self._entered = weakref.ref(self.context)
        attach(self.context)

    def leave(self) -> None:
        """Stop being current. If the run's context is attached here, the outer context is attached instead."""
        self.is_over = True
        current = get_current()
        if (unwound := _unwound(current)) is not current:
            attach(unwound)

    def describe(self, facts: Describe | None = None, content: Describe | None = None) -> None:
        """Set `facts` on the span, and the part of `content` that may be recorded."""
        if (facts is None and content is None) or not self.span.is_recording():
            return
        attributes: Attributes = {}
        try:
            if facts is not None:
                attributes |= facts()
            if content is not None:
                attributes |= self.content.filtered(content, self.span)
        finally:  # in one call: each call costs more than each attribute
            if attributes:
                self.span.set_attributes(attributes)

    def end(self) -> None:
        for task in self._tasks:
            task.remove_done_callback(self._task_done)
        self.leave()
        self.span.end(now_ns())
        self._tasks.clear()
        self.context = self.outer_context  # the inner context refers to the run: a cycle for the garbage collector

    def abandon(self) -> None:
        """End the span of a run whose end was never reported."""
        self.span.set_attribute(semconv.ERROR_TYPE, "abandoned")
        self.span.set_status(trace.StatusCode.ERROR, "the end of the run was never reported")
        self.end()

    def end_with_task(self) -> None:
        """End the run when the current asyncio task ends, if it is still open then.

        LangChain does not report the end of a model, tool or retriever whose task is cancelled.
        """
        try:
            task = asyncio.current_task()
        except RuntimeError:  # no event loop in this thread, so nothing can be cancelled
            return
        if task is not None:
            task.add_done_callback(self._task_done)
            self._tasks.append(task)

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        """End the run if its first task is done or any of its tasks was cancelled.

        The first task started the run and outlives it. A later one only makes the request and may end before the run.
        """
        if not self._tasks:  # the run has ended since the task did
            return
        outlived = task is self._tasks[0] and not self.is_over
        if (outlived or task.cancelled()) and OPEN_RUNS.pop(self.run_id) is self:
            self.content.mark_error(self.span, asyncio.CancelledError())
            self.end()

    def is_active(self) -> bool:
        """Whether the code that runs here and now belongs to the run.

        A chain may be a generator, which shares its context with its caller between two items. LangChain keeps the
        innermost run in a context variable that only code inside the run sees.
        """
        if self.is_over or not self.is_chain:
            return not self.is_over
        innermost = _innermost_run_id()
        return innermost is not None and OPEN_RUNS.get(innermost, self) is self

    def is_current(self) -> bool:
        """Whether the current span is the run's."""
        return trace.get_current_span().get_span_context() == self.span.get_span_context()

    def left(self, context: Context) -> bool:
        """Whether the run attached `context` and is over."""
        return self.is_over and self._entered is not None and self._entered() is context

    def has_user_span(self, context: Context) -> bool:
        """Whether code of the user opened the current span of `context` inside the run."""
        shown = trace.get_current_span(context)
        return context.get(_RUN) is self and not (isinstance(shown, CurrentSpan) and shown.owner is self)


class CurrentSpan(trace.Span):
    """What `trace.get_current_span()` returns inside a run: its span while the run is active, else the outer span.

    A callback cannot attach a span as usual. LangChain reports the end of an async run in a copied context, where a
    detach has no effect, and a generator leaves an attached span to its caller. A `CurrentSpan` is attached in place of
    the run's span: nothing has to be detached in time, and nothing is ever detached in the wrong place. Its `end` does
    nothing, because the run ends its span.
    """

    def __init__(self, owner: Run, outer: trace.Span) -> None:
        self.owner = owner
        self._outer = outer

    def _target(self) -> trace.Span:
        return self.owner.span if self.owner.is_active() else self._outer

    def get_span_context(self) -> trace.SpanContext:
        return self._target().get_span_context()

    def is_recording(self) -> bool:
        return self._target().is_recording()

    def end(self, end_time: int | None = None) -> None:
        pass

    def set_attributes(self, attributes: Mapping[str, AttributeValue]) -> None:
        self._target().set_attributes(attributes)

    def set_attribute(self, key: str, value: AttributeValue) -> None:
        self._target().set_attribute(key, value)

    def add_event(self, *args: Any, **kwargs: Any) -> None:
        self._target().add_event(*args, **kwargs)

    def add_link(self, *args: Any, **kwargs: Any) -> None:
        self._target().add_link(*args, **kwargs)

    def update_name(self, name: str) -> None:
        self._target().update_name(name)

    def set_status(self, *args: Any, **kwargs: Any) -> None:
        self._target().set_status(*args, **kwargs)

    def record_exception(self, *args: Any, **kwargs: Any) -> None:
        self._target().record_exception(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the SDK's spans beyond the interface, e.g. `attributes`, which users' span processors read."""
        return getattr(self._target(), name)


class OpenRuns:
    """Open runs by id, bounded in number and age."""

    def __init__(self, max_open: int = MAX_OPEN, max_seconds: float = MAX_SECONDS) -> None:
        self._runs: dict[UUID, Run] = {}
        self._lock = threading.Lock()
        self._max_open = max_open
        self._max_seconds = max_seconds

    def __len__(self) -> int:
        return len(self._runs)

    def __contains__(self, run_id: UUID) -> bool:
        return run_id in self._runs

    def get(self, run_id: UUID | None, default: Run | None = None) -> Run | None:
        return default if run_id is None else self._runs.get(run_id, default)

    def add(self, run_id: UUID, run: Run) -> None:
        """Add `run` under its own id, or under the id of a child run that has no span and is represented by it."""
        with self._lock:
            self._runs[run_id] = run
            stale = [(stale_id, self._runs.pop(stale_id)) for stale_id in self._stale_ids()]
        for stale_id, run in stale:
            if run.run_id == stale_id:
                run.abandon()

    def pop(self, run_id: UUID) -> Run | None:
        """Remove a run. None if it has no span of its own or has already ended."""
        with self._lock:
            run = self._runs.pop(run_id, None)
        return run if run is not None and run.run_id == run_id else None

    def _stale_ids(self) -> list[UUID]:
        """Ids beyond either limit, oldest first: a dict keeps the order in which runs were added."""
        oldest_allowed = time.monotonic() - self._max_seconds
        excess = len(self._runs) - self._max_open
        stale: list[UUID] = []
        for run_id, run in self._runs.items():
            if len(stale) >= excess and run.started >= oldest_allowed:
                break
            stale.append(run_id)
        return stale


OPEN_RUNS = OpenRuns()
"""Shared by all handlers of the process, so that a run that two handlers receive has one span."""


def unwound_context() -> Context:
    """The current context without the contexts that finished runs have left attached."""
    return _unwound(get_current())


def child_context(parent: Run | None, current: Context) -> Context:
    """The context in which to start a child of `parent`: it determines the child's parent span and baggage.

    A span that the user opened inside the parent is the child's parent span. A thread started without a copied context
    lacks the rollout's baggage: there, the parent's context is used, with the thread's own baggage added.
    """
    if parent is None or parent.has_user_span(current):
        return current
    context = current if _RUN in current else _with_baggage_of(current, parent.context)
    return trace.set_span_in_context(parent.span, context)


def active_run() -> Run | None:
    """The run whose context is the current one, if the code that runs here and now belongs to it."""
    run = get_current().get(_RUN)
    return run if isinstance(run, Run) and run.is_active() else None


def _unwound(context: Context) -> Context:
    while isinstance(run := context.get(_RUN), Run) and run.left(context):
        context = run.outer_context
    return context


def _with_baggage_of(source: Context, context: Context) -> Context:
    for name, value in baggage.get_all(source).items():
        context = baggage.set_baggage(name, value, context)
    return context


def _innermost_run_id() -> UUID | None:
    config = var_child_runnable_config.get()
    return getattr(config.get("callbacks"), "parent_run_id", None) if config else None
