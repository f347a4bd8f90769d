"""Scopes: blocks that change the current OpenTelemetry context, with `with` or `async with`, also inside generators.

A generator runs in the context of its reader. What its body attaches would stay attached while the reader has an item,
and for good if the reader stops; and a server may read each item in another thread or task, whose context has nothing
attached. A scope that a generator enters is therefore current while the generator's frame is on the stack, and in the
tasks and threads that its body starts.
"""

import asyncio
import contextvars
import inspect
import sys
import threading
import weakref
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar

import opentelemetry.context as otel
from opentelemetry.context import Context, attach, create_key, get_current, set_value
from opentelemetry.context.context import _RuntimeContext

Value = TypeVar("Value", covariant=True)

_BODY = create_key("agl.generator_body")
_IS_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_FIXTURES = ("_pytest.", "pytest_asyncio.", "anyio.pytest_plugin")
"""Modules that run a generator's first part before a test and the rest after it, as `contextlib` does with a block."""


class Scope(AbstractContextManager[Value], AbstractAsyncContextManager[Value], Generic[Value]):
    """A single-use context manager for both `with` and `async with`; it never waits."""

    def __init__(self, block: AbstractContextManager[Value]) -> None:
        self._block = block
        self._body: _Body | None = None

    def __enter__(self) -> Value:
        return self._enter(sys._getframe(1))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        leave = self._body.leave if self._body else self._block.__exit__
        return leave(kind, error, traceback)

    async def __aenter__(self) -> Value:
        return self._enter(sys._getframe(1))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self.__exit__(kind, error, traceback)

    def _enter(self, caller: FrameType) -> Value:
        frame = _generator_of(caller)
        if frame is None:
            return self._block.__enter__()
        _BodyContexts.install()
        body = _Body(frame, self._block)
        value = body.enter()
        self._body = body
        return value


class _Body:
    """The body of a generator, from the scope that it entered to the end of that scope."""

    def __init__(self, frame: FrameType, block: AbstractContextManager[Any]) -> None:
        self.frame = frame
        self.outer = get_current()
        self._block = block
        self._variables = contextvars.copy_context()
        """The block is entered and left in these, because the generator may be resumed in a different context."""
        self._readers: weakref.WeakKeyDictionary[object, Context] = weakref.WeakKeyDictionary()
        """The threads and tasks in whose own context the body's was attached, and what was attached there before."""

    def enter(self) -> Any:
        value = self._variables.run(self._block.__enter__)
        self.inside = self._variables.run(set_value, _BODY, self)
        self.attach()
        _OPEN.add(self)
        return value

    def leave(self, *error: Any) -> bool | None:
        _OPEN.remove(self)
        if _BodyContexts.attached().get(_BODY) is self:
            before, around = self.before(), self.outer.get(_BODY)
            attach(self.outer)
            if isinstance(around, _Body) and before is not None and before is not self.outer:
                around._readers.setdefault(_place(), before)
        return self._variables.run(self._block.__exit__, *error)

    def attach(self) -> None:
        self._readers[_place()] = _BodyContexts.attached()
        attach(self.inside)

    def before(self) -> Context | None:
        """What a reader here had attached before the body ran; None in a task or thread that the body started."""
        return self._readers.get(_place())


class _OpenBodies:
    """Bodies whose scope is not over. References are weak: a generator that nobody reads any more must end."""

    def __init__(self) -> None:
        self._bodies: tuple[weakref.ref[_Body], ...] = ()
        self._lock = threading.Lock()

    def add(self, body: _Body) -> None:
        with self._lock:
            self._bodies = (*self._bodies, weakref.ref(body))

    def remove(self, body: _Body) -> None:
        with self._lock:
            self._bodies = tuple(ref for ref in self._bodies if ref() not in (None, body))

    def running(self) -> _Body | None:
        """The innermost body on the stack of this thread. A generator that is suspended has no calling frame."""
        bodies = [body for ref in reversed(self._bodies) if (body := ref()) and body.frame.f_back]
        frame = sys._getframe(1) if bodies else None
        while frame is not None:
            for body in bodies:
                if body.frame is frame:
                    return body
            frame = frame.f_back
        return None


_OPEN = _OpenBodies()


class _BodyContexts(_RuntimeContext):
    """OpenTelemetry's current context, corrected if a body has been suspended or resumed since it was attached."""

    def __init__(self, original: _RuntimeContext) -> None:
        self.original = original

    def attach(self, context: Context) -> contextvars.Token[Context]:
        return self.original.attach(context)

    def detach(self, token: contextvars.Token[Context]) -> None:
        self.original.detach(token)

    @classmethod
    def install(cls) -> None:
        """Done when a generator first enters a scope, so that other programs keep OpenTelemetry's own."""
        if not isinstance(otel._RUNTIME_CONTEXT, cls):
            otel._RUNTIME_CONTEXT = cls(otel._RUNTIME_CONTEXT)

    @classmethod
    def attached(cls) -> Context:
        """The attached context, whether or not it is current."""
        runtime = otel._RUNTIME_CONTEXT
        return (runtime.original if isinstance(runtime, cls) else runtime).get_current()

    def get_current(self) -> Context:
        attached = context = self.original.get_current()
        running = _OPEN.running()
        while isinstance(body := context.get(_BODY), _Body) and body is not running:
            before = body.before()
            if before is None:
                break
            if context is attached:
                body.inside = context  # with what the body attached since
            context = before
        if running is not None and context.get(_BODY) is not running:
            self.attach(context)
            running.attach()
            return running.inside
        if context is not attached:
            self.attach(context)
        return context


def _place() -> object:
    """The current task, else the current thread: code in the same place shares a context."""
    try:
        return asyncio.current_task() or threading.current_thread()
    except RuntimeError:  # no event loop in this thread
        return threading.current_thread()


def _generator_of(frame: FrameType | None) -> FrameType | None:
    """The generator that enters a scope in `frame`, directly or by context managers; None if no generator does.

    A generator behind `@contextmanager` is not read: its scope is that of the block which it is made for.
    """
    while frame is not None:
        if _module(frame) == "contextlib":
            frame = frame.f_back
        elif not frame.f_code.co_flags & _IS_GENERATOR or _module(frame.f_back).startswith(_FIXTURES):
            return None
        elif _module(frame.f_back) == "contextlib":
            frame = frame.f_back
        else:
            return frame
    return None


def _module(frame: FrameType | None) -> str:
    return str(frame.f_globals.get("__name__")) if frame else ""
