"""A LangChain run under way: its span, and where that span is the current one.

A callback cannot make a span current the usual way. LangChain reports the end of an async run in a copied context,
where what the start attached cannot be detached; and a generator leaves what it attached to whoever reads it. So what
is attached is not the span but a `CurrentSpan`: it answers for the run's span while the run is in force, and for the
span beneath it otherwise. Nothing has to be detached in time, and nothing is ever detached in the wrong place.
"""

import asyncio
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
from agl_langchain._call import Attributes, CapturedCall
from agl_langchain._open_runs import OPEN_RUNS
from agl_langchain._role import Actor

Describe = Callable[[], Attributes]

_RUN = create_key("agl_langchain.run")


@dataclass(slots=True, eq=False)
class Run:
    """A run, from its start event to its end event."""

    run_id: UUID
    span: trace.Span
    actor: Actor
    role: str | None
    is_chain: bool
    before: Context
    """The OpenTelemetry context that the run was started in."""
    context: Context
    """The one inside the run."""
    content: ContentFilter
    """Of the handler that opened the run, whichever else hears of it."""
    call: CapturedCall | None = None
    """Of a model call: what the model itself notes of it."""
    over: bool = False
    """Whether the span has ceased to be current: the run has ended, or its model has begun to answer."""
    started: float = field(default_factory=time.monotonic)
    _entered: weakref.ref[Context] | None = None
    _tasks: list[asyncio.Task[Any]] = field(default_factory=list)

    def enter(self, *, as_current: bool = True) -> None:
        """Make the run's context the current one, with its span as the current span of it where `as_current`."""
        if as_current:
            shown = CurrentSpan(self, trace.get_current_span(self.before))
            self.context = trace.set_span_in_context(shown, self.context)
        self.context = set_value(_RUN, self, self.context)
        self._entered = weakref.ref(self.context)
        attach(self.context)

    def leave(self) -> None:
        """Cease to be current. Where this task or thread still has the run's context, it gets back the one before."""
        self.over = True
        current = get_current()
        if (settled := _settled(current)) is not current:
            attach(settled)

    def describe(self, facts: Describe | None = None, content: Describe | None = None) -> None:
        """Put `facts` on the span, and `content` as far as it may go there."""
        if (facts is None and content is None) or not self.span.is_recording():
            return
        said: Attributes = {}
        try:
            if facts is not None:
                said |= facts()
            if content is not None:
                said |= self.content.filtered(content)
        finally:  # all at once: a span takes longer over each time than over each attribute
            if said:
                self.span.set_attributes(said)

    def end(self) -> None:
        for task in self._tasks:
            task.remove_done_callback(self._task_done)
        self.leave()
        self.span.end()
        self._tasks.clear()
        self.context = self.before  # the run's own holds the run: a cycle that only the garbage collector would break

    def watch_task(self) -> None:
        """End with the task that runs here, should it end first.

        Of a model, tool or retriever whose task is cancelled, LangChain does not report the end.
        """
        try:
            task = asyncio.current_task()
        except RuntimeError:  # no event loop in this thread, so nothing to be cancelled
            return
        if task is not None:
            task.add_done_callback(self._task_done)
            self._tasks.append(task)

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        """The task that started the run outlives it; one that makes its request, for it, need not."""
        if not self._tasks:  # the run has ended since its task did
            return
        outlived = task is self._tasks[0] and not self.over
        if (outlived or task.cancelled()) and OPEN_RUNS.pop(self.run_id) is self:
            self.content.mark_error(self.span, asyncio.CancelledError())
            self.end()

    def give_up(self) -> None:
        """End the span of a run whose end nobody reports."""
        self.span.set_attribute(semconv.ERROR_TYPE, "abandoned")
        self.span.set_status(trace.StatusCode.ERROR, "the end of the run was never reported")
        self.end()

    def in_force(self) -> bool:
        """Whether code that runs here and now belongs to the run.

        A chain may be a generator, whose reader shares its context between two items. LangChain itself says what runs
        inside: it keeps the innermost run in a context variable that only the inside sees.
        """
        if self.over or not self.is_chain:
            return not self.over
        innermost = _innermost_run_id()
        return innermost is not None and OPEN_RUNS.get(innermost, self) is self

    def is_current(self) -> bool:
        """Whether the current span is the run's."""
        return trace.get_current_span().get_span_context() == self.span.get_span_context()

    def has_left(self, context: Context) -> bool:
        """Whether `context` is the one that the run entered, and the run has ceased to be current."""
        return self.over and self._entered is not None and self._entered() is context

    def holds(self, context: Context) -> bool:
        """Whether the current span of `context` was opened inside the run, by other code than ours."""
        shown = trace.get_current_span(context)
        return context.get(_RUN) is self and not (isinstance(shown, CurrentSpan) and shown.run is self)


class CurrentSpan(trace.Span):
    """What code inside a run gets from `trace.get_current_span()`. It cannot be ended: the run does that."""

    def __init__(self, run: Run, outer: trace.Span) -> None:
        self.run = run
        self._outer = outer

    def _answering(self) -> trace.Span:
        return self.run.span if self.run.in_force() else self._outer

    def get_span_context(self) -> trace.SpanContext:
        return self._answering().get_span_context()

    def is_recording(self) -> bool:
        return self._answering().is_recording()

    def end(self, end_time: int | None = None) -> None:
        pass

    def set_attributes(self, attributes: Mapping[str, AttributeValue]) -> None:
        self._answering().set_attributes(attributes)

    def set_attribute(self, key: str, value: AttributeValue) -> None:
        self._answering().set_attribute(key, value)

    def add_event(self, *args: Any, **kwargs: Any) -> None:
        self._answering().add_event(*args, **kwargs)

    def add_link(self, *args: Any, **kwargs: Any) -> None:
        self._answering().add_link(*args, **kwargs)

    def update_name(self, name: str) -> None:
        self._answering().update_name(name)

    def set_status(self, *args: Any, **kwargs: Any) -> None:
        self._answering().set_status(*args, **kwargs)

    def record_exception(self, *args: Any, **kwargs: Any) -> None:
        self._answering().record_exception(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What the SDK's spans have beyond the interface, e.g. `attributes`, which span processors of users read."""
        return getattr(self._answering(), name)


def settled_context() -> Context:
    """The current context, without what runs that are over have left on top of it."""
    return _settled(get_current())


def child_context(parent: Run | None, current: Context) -> Context:
    """The context to start a child of `parent` in: its span is the child's parent, its baggage the child's.

    A span opened by user code inside the parent comes between the two. A thread that was started without a copied
    context knows nothing of the rollout: there the parent's context counts, with the thread's own baggage added.
    """
    if parent is None or parent.holds(current):
        return current
    context = current if _RUN in current else _joined(parent.context, current)
    return trace.set_span_in_context(parent.span, context)


def run_in_force() -> Run | None:
    """The run whose context is the current one, if code here and now belongs to it."""
    run = get_current().get(_RUN)
    return run if isinstance(run, Run) and run.in_force() else None


def _settled(context: Context) -> Context:
    while isinstance(run := context.get(_RUN), Run) and run.has_left(context):
        context = run.before
    return context


def _joined(context: Context, addition: Context) -> Context:
    for name, value in baggage.get_all(addition).items():
        context = baggage.set_baggage(name, value, context)
    return context


def _innermost_run_id() -> UUID | None:
    config = var_child_runnable_config.get()
    return getattr(config.get("callbacks"), "parent_run_id", None) if config else None
