"""Async calls of completion models, whose runs LangChain starts in another way than all others."""

import functools
from collections.abc import Awaitable, Callable
from typing import Any

from opentelemetry.context import attach, detach, get_current

from agl_langchain._open_runs import OPEN_RUNS
from agl_langchain._patch import Undo, replace

Coroutine = Callable[..., Awaitable[Any]]


def mend_async_completions() -> list[Undo]:
    """From now on these calls are made inside their run, and every handler hears of their start."""
    from langchain_core.callbacks import AsyncCallbackManager
    from langchain_core.language_models import BaseLLM

    return [
        replace(AsyncCallbackManager, "on_llm_start", _telling_all_handlers),
        replace(BaseLLM, "_agenerate_helper", _inside_its_run),
    ]


def _telling_all_handlers(original: Coroutine) -> Coroutine:
    """Where one handler is inline, as ours is, LangChain tells none of the others, `astream_events` included."""

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
    """The run was started in a task of its own, where its span is current for nobody."""

    @functools.wraps(original)
    async def agenerate_helper(model: Any, prompts: Any, stop: Any, run_managers: Any, **kwargs: Any) -> Any:
        run = OPEN_RUNS.get(run_managers[0].run_id) if len(run_managers) == 1 else None
        token = attach(run.context if run else get_current())
        try:
            return await original(model, prompts, stop, run_managers, **kwargs)
        finally:
            detach(token)

    return agenerate_helper
