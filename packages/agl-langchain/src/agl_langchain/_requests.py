"""`traceparent` and `baggage` on the requests of `ChatOpenAI` and `OpenAI`."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

from opentelemetry.instrumentation.utils import is_instrumentation_enabled

import agl
from agl.failsafe import never_raises
from agl_langchain._patch import Undo, replace
from agl_langchain._run import run_in_force

Payload = dict[str, Any]


def put_headers_on_requests() -> list[Undo]:
    """From now on every request says which call, rollout and role it belongs to. Returns what takes that back.

    Does nothing where `langchain_openai` is not installed.
    """
    if find_spec("langchain_openai") is None:
        return []
    from langchain_openai.chat_models.base import BaseChatOpenAI
    from langchain_openai.llms.base import BaseOpenAI

    return [
        replace(BaseChatOpenAI, "_get_request_payload", _with_headers),
        replace(BaseOpenAI, "_invocation_params", _property_with_headers),
    ]


def _with_headers(original: Callable[..., Payload]) -> Callable[..., Payload]:
    @functools.wraps(original)
    def get_request_payload(*args: Any, **kwargs: Any) -> Payload:
        return _add_headers(original(*args, **kwargs))

    return get_request_payload


def _property_with_headers(original: property) -> property:
    getter: Callable[[Any], Payload] = original.__get__
    return property(lambda model: _add_headers(getter(model)), doc=original.__doc__)


def _add_headers(payload: Payload) -> Payload:
    """Ours replace the client's own of the same name: a fixed `traceparent` could only be wrong."""
    with never_raises("a model request carries no traceparent"):
        if is_instrumentation_enabled():
            payload["extra_headers"] = {**(payload.get("extra_headers") or {}), **_headers()}
    return payload


def _headers() -> dict[str, str]:
    """Of the call in force. Its request has a task of its own, which can be cancelled while the caller goes on."""
    run = run_in_force()
    if run is not None and not run.is_chain:
        run.watch_task()
    with agl.role(run.role) if run and run.role else nullcontext():
        return agl.headers()
