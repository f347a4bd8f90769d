"""Generators in a context: it is current while the generator's body runs, not while the caller has an item."""

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from opentelemetry.context import Context, attach, detach, get_current

MAX_ITEMS = 1000
"""Items recorded as the output of the span; a generator may be infinite."""


class GeneratorBody:
    """The OpenTelemetry context of a generator's body, attached during each step only.

    A generator runs in its caller's context, so a context attached between steps would be the caller's as well.
    """

    def __init__(self, context: Context) -> None:
        self.items: list[Any] = []
        self._context = context

    def __enter__(self) -> None:
        self._token = attach(self._context)

    def __exit__(self, *_: object) -> None:
        # The body may have entered a role or a span that lasts beyond this step.
        self._context = get_current()
        detach(self._token)

    def keep(self, item: Any) -> None:
        if len(self.items) < MAX_ITEMS:
            self.items.append(item)


OpenBody = Callable[[tuple[Any, ...], dict[str, Any]], AbstractContextManager[GeneratorBody]]
"""Opens the context of one call from its positional and keyword arguments."""


def wrap_generator(function: Callable[..., Any], open_body: OpenBody) -> Callable[..., Any]:
    """`function` in that context; values sent, thrown and returned pass through."""

    def generate(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        with open_body(args, kwargs) as body:
            generator = function(*args, **kwargs)
            resume = partial(generator.send, None)
            while True:
                try:
                    with body:
                        item = resume()
                except StopIteration as stop:
                    return stop.value
                body.keep(item)
                try:
                    resume = partial(generator.send, (yield item))
                except GeneratorExit:
                    with body:
                        generator.close()
                    raise
                except BaseException as error:  # noqa: BLE001 - it is thrown into the generator
                    resume = partial(generator.throw, error)

    return generate


def wrap_async_generator(function: Callable[..., Any], open_body: OpenBody) -> Callable[..., Any]:
    """`wrap_generator` for an asynchronous generator function."""

    async def generate(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        with open_body(args, kwargs) as body:
            generator = function(*args, **kwargs)
            resume = partial(generator.asend, None)
            while True:
                try:
                    with body:
                        item = await resume()
                except StopAsyncIteration:
                    return
                body.keep(item)
                try:
                    resume = partial(generator.asend, (yield item))
                except GeneratorExit:
                    with body:
                        await generator.aclose()
                    raise
                except BaseException as error:  # noqa: BLE001 - it is thrown into the generator
                    resume = partial(generator.athrow, error)

    return generate
