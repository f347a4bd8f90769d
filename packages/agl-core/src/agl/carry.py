"""`agl.carry`: the workers of a thread or process pool run a function in the rollout of the code that submits it."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

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
        with joined(self.headers):
            if os.getpid() == self.process_id:
                return self.function(*args, **kwargs)
            return self._run_in_worker_process(*args, **kwargs)

    def _run_in_worker_process(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with never_raises("the spans of a worker process are not exported"):
            if self.export_settings is not None:
                init(**self.export_settings)
        try:
            return self.function(*args, **kwargs)
        finally:
            if self.export_settings is not None:
                flush()  # pools terminate their workers without notice


def carry(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A function that calls `function` in the current rollout, role and span, from any thread or process.

        pool.submit(agl.carry(work), task)

    In a worker process, forked or spawned, spans are exported and redacted as in this process, and are sent before the
    call returns. A process pool pickles `function` and the `redact` of `agl.init`: functions of a module, no lambdas.
    """
    return CarriedFunction(function, headers(), export_settings(), os.getpid())
