"""`operation`: a step of the agent as a span with its input and output; a decorator and a `with` block."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from opentelemetry import trace

from agl import semconv
from agl.content.filter import content_json
from agl.context import TRACER, ending, open_span
from agl.emit.attributes import flat_attributes
from agl.emit.generators import GeneratorBody, wrap_async_generator, wrap_generator
from agl.emit.record import EMITTED_CONTENT
from agl.failsafe import never_raises, raises_if_strict
from agl.scope import Scope
from agl.span import AttributeValue, now_ns

Function = TypeVar("Function", bound=Callable[..., Any])


class ActiveOperation:
    """A running operation. Values are recorded as JSON, objects that JSON has no form for as their `repr`."""

    def __init__(self, span: trace.Span) -> None:
        self.span = span

    def set_input(self, value: Any) -> None:
        self._set(semconv.OPERATION_INPUT, value)

    def set_output(self, value: Any) -> None:
        self._set(semconv.OPERATION_OUTPUT, value)

    def _set(self, name: str, value: Any) -> None:
        with never_raises(f"{name} was not recorded"):
            EMITTED_CONTENT.set_content(self.span, lambda: {name: content_json(value, repr)})


class Operation(Scope[ActiveOperation]):
    """Result of `agl.operation(name)`: a context manager for `with` and `async with`, and a decorator."""

    def __init__(self, name: str | None, attributes: Mapping[str, Any] | None) -> None:
        self._name = name
        self._attributes = attributes
        super().__init__(_run_block(name or "operation", attributes))

    def __call__(self, function: Function) -> Function:
        return _decorate(function, self._name, self._attributes)


@overload
def operation(name: str | None = None, /, *, attributes: Mapping[str, Any] | None = None) -> Operation: ...


@overload
def operation(name: Function, /) -> Function: ...


def operation(name: Any = None, /, *, attributes: Mapping[str, Any] | None = None) -> Any:
    """Record a step as a span: `@agl.operation`, `@agl.operation("name")` or a `with` block.

        with agl.operation("restock") as step:
            step.set_output(restock(shelf))

    The decorator takes functions, coroutine functions, generators and async generators, and records their arguments and
    result; of a generator, the first items (at most `generators.MAX_ITEMS`). Exceptions of the step propagate.
    """
    return _decorate(name, None, attributes) if callable(name) else Operation(name, attributes)


@dataclass(frozen=True, slots=True)
class _DecoratedFunction:
    """The name, attributes and signature from which a decorated function's spans start."""

    attributes: Mapping[str, AttributeValue]
    signature: inspect.Signature | None

    @contextmanager
    def running(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[ActiveOperation]:
        """A call in a span that is current until the call returns."""
        with open_span(semconv.SPAN_OPERATION, EMITTED_CONTENT.redacted(self.attributes)) as span:
            yield self._begin(span, args, kwargs)

    @contextmanager
    def generating(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[GeneratorBody]:
        """A generator in a span that is current in the body only."""
        attributes = EMITTED_CONTENT.redacted(self.attributes)
        with ending(TRACER.start_span(semconv.SPAN_OPERATION, attributes=attributes, start_time=now_ns())) as span:
            active = self._begin(span, args, kwargs)
            body = GeneratorBody(trace.set_span_in_context(span))
            try:
                yield body
            finally:
                active.set_output(body.items)

    def _begin(self, span: trace.Span, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ActiveOperation:
        active = ActiveOperation(span)
        active.set_input(self._named(args, kwargs))
        return active

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by parameter name, without `self` and `cls`."""
        try:
            if self.signature is None:
                raise TypeError
            named = self.signature.bind(*args, **kwargs).arguments
        except TypeError:  # no signature, or arguments that do not fit it: then the call itself raises
            return {"args": args, "kwargs": kwargs}
        return {name: value for name, value in named.items() if name not in ("self", "cls")}


def _decorate(function: Callable[..., Any], name: str | None, attributes: Mapping[str, Any] | None) -> Any:
    """`function` in a span, as the same kind of function, because frameworks inspect the kind."""
    named: str = name or getattr(function, "__qualname__", type(function).__name__)
    decorated = _DecoratedFunction(_first_attributes(named, attributes), _signature(function))
    if inspect.isasyncgenfunction(function):
        wrapped = wrap_async_generator(function, decorated.generating)
    elif inspect.isgeneratorfunction(function):
        wrapped = wrap_generator(function, decorated.generating)
    elif inspect.iscoroutinefunction(function):
        wrapped = _wrap_coroutine(function, decorated)
    else:
        wrapped = _wrap_function(function, decorated)
    return functools.wraps(function)(wrapped)


def _wrap_function(function: Callable[..., Any], decorated: _DecoratedFunction) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with decorated.running(args, kwargs) as active:
            result = function(*args, **kwargs)
            active.set_output(result)
            return result

    return call


def _wrap_coroutine(function: Callable[..., Any], decorated: _DecoratedFunction) -> Callable[..., Any]:
    async def call(*args: Any, **kwargs: Any) -> Any:
        with decorated.running(args, kwargs) as active:
            result = await function(*args, **kwargs)
            active.set_output(result)
            return result

    return call


@contextmanager
def _run_block(name: str, attributes: Mapping[str, Any] | None) -> Iterator[ActiveOperation]:
    with open_span(semconv.SPAN_OPERATION, EMITTED_CONTENT.redacted(_first_attributes(name, attributes))) as span:
        yield ActiveOperation(span)


def _first_attributes(name: str, attributes: Mapping[str, Any] | None) -> dict[str, AttributeValue]:
    first: dict[str, AttributeValue] = {}
    with raises_if_strict(f"attributes of operation {name} were not recorded"):
        first |= flat_attributes(attributes or {})
    return first | {semconv.OPERATION_NAME: name}


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except ValueError:  # some builtins have no signature
        return None
