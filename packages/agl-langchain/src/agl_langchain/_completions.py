"""Patches of async calls of completion models, whose runs LangChain starts differently from all others."""

import functools
from collections.abc import Awaitable, Callable
from typing import Any

from opentelemetry.context import attach, detach, get_current

from agl.patches import Patches
from agl_langchain._run import OPEN_RUNS

Coroutine = Callable[..., Awaitable[Any]]


def patch_async_completions(patches: Patches) -> None:
    """Make these calls inside their run, and report their start to every handler."""
    from langchain_core.callbacks import AsyncCallbackManager
    from langchain_core.language_models import BaseLLM

    patches.replace(AsyncCallbackManager, "on_llm_start", _reporting_to_every_handler)
    patches.replace(BaseLLM, "_agenerate_helper", _inside_its_run)


def _reporting_to_every_handler(original: Coroutine) -> Coroutine:
    """If any handler runs inline, as ours does, LangChain reports to the inline ones only, not to `astream_events`."""

    @functools.wraps(original)
    async def on_llm_start(manager: Any, serialized: Any, prompts: list[str], run_id: Any = None, **kwargs: Any) -> Any:
        inline = [handler for handler in manager.handlers if handler.run_inline]
        others = [handler for handler in manager.handlers if not handler.run_inline]
        if not inline or not others:
            return await original(manager, serialized, prompts, run_id=run_id, **kwargs)
        runs = await original(_with_handlers(manager, others), serialized, prompts, run_id=run_id, **kwargs)
        for run, prompt in zip(runs, prompts, strict=True):
            await original(_with_handlers(manager, inline), serialized, [prompt], run_id=run.run_id, **kwargs)
            run.handlers = manager.handlers
        return runs

    return on_llm_start


def _with_handlers(manager: Any, handlers: list[Any]) -> Any:
    copy = manager.copy()
    copy.handlers = handlers
    return copy


def _inside_its_run(original: Coroutine) -> Coroutine:
    """LangChain starts the run in a separate task, whose context is not that of the request."""

    @functools.wraps(original)
    async def agenerate_helper(model: Any, prompts: Any, stop: Any, run_managers: Any, **kwargs: Any) -> Any:
        run = OPEN_RUNS.get(run_managers[0].run_id) if len(run_managers) == 1 else None
        token = attach(run.context if run else get_current())
        try:
            return await original(model, prompts, stop, run_managers, **kwargs)
        finally:
            detach(token)

    return agenerate_helper
