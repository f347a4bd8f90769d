"""The instrumentor: a handler on every run, and headers on every request, with no change to the agent's code."""

from collections.abc import Collection
from contextvars import ContextVar
from typing import Any

from opentelemetry.instrumentation.instrumentor import BaseInstrumentor

from agl_langchain._completions import mend_async_completions
from agl_langchain._handler import AglCallbackHandler
from agl_langchain._patch import Undo
from agl_langchain._requests import put_headers_on_requests
from agl_langchain._response_id import note_ids_of_streams


class LangChainInstrumentor(BaseInstrumentor):
    """`instrument()` traces every LangChain and LangGraph run; `uninstrument()` leaves the framework as it was.

    `instrument` takes the arguments of `AglCallbackHandler`: `roles`, `capture_content`, `redact`,
    `tracer_provider`. A run that is given a handler of its own besides still yields each span once.
    """

    _undo: Collection[Undo] = ()

    def instrumentation_dependencies(self) -> Collection[str]:
        return ("langchain-core >= 1.2.10, < 2",)

    def _instrument(self, **kwargs: Any) -> None:
        handler = AglCallbackHandler(
            roles=kwargs.get("roles"),
            capture_content=kwargs.get("capture_content"),
            redact=kwargs.get("redact"),
            tracer_provider=kwargs.get("tracer_provider"),
        )
        self._undo = [
            _give_to_every_run(handler),
            *mend_async_completions(),
            *put_headers_on_requests(),
            *note_ids_of_streams(),
        ]

    def _uninstrument(self, **kwargs: Any) -> None:
        for undo in self._undo:
            undo()
        self._undo = ()


def _give_to_every_run(handler: AglCallbackHandler) -> Undo:
    """Have LangChain add `handler` to every run that has no handler of its class."""
    from langchain_core.tracers import context

    # a variable's default is seen in every thread and task; a set value only in those that inherit it
    variable = ContextVar("agl_langchain_handler", default=handler)
    context.register_configure_hook(variable, inheritable=True, handle_class=AglCallbackHandler)
    hook = context._configure_hooks[-1]
    return lambda: context._configure_hooks.remove(hook)
