"""`LangChainInstrumentor`: traces every run without a change to the agent's code."""

from collections.abc import Collection
from contextvars import ContextVar
from typing import Any

from opentelemetry.instrumentation.instrumentor import BaseInstrumentor

from agl.patches import Patches
from agl_langchain._completions import patch_async_completions
from agl_langchain._handler import AglCallbackHandler
from agl_langchain._openai import patch_openai
from agl_langchain._role import patch_graph_names


class LangChainInstrumentor(BaseInstrumentor):
    """Traces every LangChain and LangGraph run after `instrument()`; `uninstrument()` restores the framework.

        LangChainInstrumentor().instrument(roles={"executor": "execute.*|tools"})

    `instrument` takes the arguments of `AglCallbackHandler`: `roles`, `capture_content`, `redact`, `tracer_provider`.
    A run that also has its own `AglCallbackHandler` still yields each span once. If a patch fails, `instrument` undoes
    the earlier ones and raises.
    """

    _patches = Patches()

    def instrumentation_dependencies(self) -> Collection[str]:
        return ("langchain-core >= 1.2.10, < 2",)

    def _instrument(self, **kwargs: Any) -> None:
        handler = AglCallbackHandler(
            roles=kwargs.get("roles"),
            capture_content=kwargs.get("capture_content"),
            redact=kwargs.get("redact"),
            tracer_provider=kwargs.get("tracer_provider"),
        )
        with self._patches.all_or_none():
            _add_to_every_run(self._patches, handler)
            patch_async_completions(self._patches)
            patch_openai(self._patches)
            patch_graph_names(self._patches)

    def _uninstrument(self, **kwargs: Any) -> None:
        self._patches.restore()


def _add_to_every_run(patches: Patches, handler: AglCallbackHandler) -> None:
    """Make LangChain add `handler` to every run that has no `AglCallbackHandler`."""
    from langchain_core.tracers import context

    # the default of a variable applies in every thread and task; a set value only where it is inherited
    variable = ContextVar("agl_langchain_handler", default=handler)
    context.register_configure_hook(variable, inheritable=True, handle_class=AglCallbackHandler)
    patches.on_restore(context._configure_hooks.remove, context._configure_hooks[-1])
