"""Async generators that run in a context of their own.

A generator's body runs in the context of the caller that requests the next item. A span that it makes current would
stay current in the caller between items, and for good if it stops early. Here, all steps run in one private context.
"""

import contextvars
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator
from contextlib import aclosing
from types import coroutine
from typing import Any, TypeVar

from opentelemetry.context import Context, attach

Item = TypeVar("Item")


class IsolatedStream(AsyncIterator[Item]):
    """The items of `stream`, whose body runs in a copy of the caller's context variables made once.

    `context`, if given, is the OpenTelemetry context inside. Close the stream with `aclosing`.
    """

    def __init__(self, stream: AsyncGenerator[Item, None], context: Context | None = None) -> None:
        self._stream = stream
        self._variables = contextvars.copy_context()
        if context is not None:
            self._variables.run(attach, context)

    async def __anext__(self) -> Item:
        return await _await_in(self._variables, anext(self._stream))

    async def aclose(self) -> None:
        await _await_in(self._variables, self._stream.aclose())


def isolated(original: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncGenerator[Any, None]]:
    """The async generator function `original`, isolated from its caller's context."""

    @functools.wraps(original)
    async def stream(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        async with aclosing(IsolatedStream(original(*args, **kwargs))) as items:
            async for item in items:
                yield item

    return stream


@coroutine
def _await_in(variables: contextvars.Context, awaitable: Awaitable[Item]) -> Generator[Any, Any, Item]:
    """Await with every step run in `variables`, but in the same task, so that timeouts and cancellation still work."""
    steps: Any = awaitable.__await__()
    resume = functools.partial(steps.send, None)
    while True:
        try:
            pending = variables.run(resume)
        except StopIteration as done:
            return done.value
        try:
            resume = functools.partial(steps.send, (yield pending))
        except BaseException as error:  # noqa: BLE001 - thrown into the awaitable, as `await` does
            resume = functools.partial(steps.throw, error)
