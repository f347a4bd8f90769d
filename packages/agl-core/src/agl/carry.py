"""`agl.carry`: the workers of a thread or process pool run a function in the rollout of the code that submits it."""

import inspect
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

from opentelemetry.context import get_current

from agl.emit.generators import GeneratorBody, wrap_async_generator, wrap_generator
from agl.failsafe import never_raises
from agl.propagation import headers, joined
from agl.tracing import export_settings, flush, init

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class CarriedFunction(Generic[Parameters, Result]):
    """A function together with the context to run it in. It can be pickled if the function can."""

    function: Callable[Parameters, Result]
    headers: Mapping[str, str]
    export_settings: Mapping[str, Any] | None
    """Arguments of `init` in the submitting process; None if it exports nothing."""
    process_id: int
    """Of the submitting process."""

    def __call__(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with self._running():
            result = self.function(*args, **kwargs)
        return self._later(result)

    def _later(self, result: Any) -> Any:
        """The result, or the work that it only begins: a coroutine or generator then runs in the context, too."""
        if inspect.iscoroutine(result):
            return self._awaited(result)
        if inspect.isgenerator(result):
            return wrap_generator(lambda: result, self._generating)()
        if inspect.isasyncgen(result):
            return wrap_async_generator(lambda: result, self._generating)()
        return result

    async def _awaited(self, work: Awaitable[Any]) -> Any:
        with self._running():
            return await work

    @contextmanager
    def _generating(self, *_: Any) -> Iterator[GeneratorBody]:
        with self._running():
            body = GeneratorBody(get_current())
            yield body

    @contextmanager
    def _running(self) -> Iterator[None]:
        in_worker_process = os.getpid() != self.process_id and self.export_settings is not None
        with joined(self.headers):
            if in_worker_process and self.export_settings is not None:
                with never_raises("the spans of a worker process are not exported"):
                    init(**self.export_settings)
            try:
                yield
            finally:
                if in_worker_process:
                    flush()  # pools terminate their workers without notice


class CarriedCoroutineFunction(CarriedFunction[Parameters, Result]):
    """A function that frameworks must see to be asynchronous: they run other functions in threads."""

    async def __call__(  # type: ignore[override]  # the coroutine is the Result
        self, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Any:
        return await self._awaited(self.function(*args, **kwargs))  # type: ignore[arg-type]  # it returns a coroutine


def carry(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A function that calls `function` in the current rollout, role and span, from any thread or process.

        pool.submit(agl.carry(work), task)

    `function` may be a coroutine function, a generator function or an async generator function: its work runs in the
    rollout whenever it is awaited or read.

    In a worker process, forked or spawned, spans are exported and redacted as in this process, and are sent before the
    call returns. A process pool pickles `function` and the `redact` of `agl.init`: functions of a module, no lambdas.
    """
    kind = CarriedCoroutineFunction if inspect.iscoroutinefunction(function) else CarriedFunction
    return kind(function, headers(), export_settings(), os.getpid())
