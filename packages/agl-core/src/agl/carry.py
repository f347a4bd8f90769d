"""Work for the threads and processes of a pool, which know nothing of the rollout that it is part of."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

from agl.context import headers, joined
from agl.failsafe import never_raises
from agl.tracing import flush, init, settings

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Carried(Generic[Parameters, Result]):
    """A function with the context in which it shall run. Pickles if the function does."""

    function: Callable[Parameters, Result]
    headers: Mapping[str, str]
    settings: Mapping[str, Any] | None
    """How the process exports in which it was made."""
    process: int

    def __call__(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with joined(self.headers):
            if os.getpid() == self.process:
                return self.function(*args, **kwargs)
            return self._run_elsewhere(*args, **kwargs)

    def _run_elsewhere(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with never_raises("the spans of a worker process are not exported"):
            if self.settings is not None:
                init(**self.settings)
        try:
            return self.function(*args, **kwargs)
        finally:
            if self.settings is not None:
                flush()  # Pools end their workers without notice.


def carry(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """`function`, to be called by the worker of a pool in the rollout, role and span that are in force here and now.

    `pool.submit(agl.carry(work), task)`. In another process, forked or spawned, spans go where those of this process
    go, redacted as here, and are sent before the call returns; the pool needs to pickle `function`, and the `redact` of
    `agl.init`: functions of a module, not lambdas.
    """
    return Carried(function, headers(), settings(), os.getpid())
