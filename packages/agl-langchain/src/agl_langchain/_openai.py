"""Patches of `langchain_openai`: trace headers on requests, and the response id of streams on the call's span."""

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

from opentelemetry.instrumentation.utils import is_instrumentation_enabled

import agl
from agl import semconv
from agl.failsafe import never_raises
from agl.patches import Patches
from agl_langchain._run import active_run

Payload = dict[str, Any]


def patch_openai(patches: Patches) -> None:
    """Add `traceparent` and `baggage` to each request, and the response id to the span of each streamed call.

    LangChain reports a stream's response id (in its first chunk) to no callback. No effect without `langchain_openai`.
    """
    if find_spec("langchain_openai") is None:
        return
    from langchain_openai.chat_models.base import BaseChatOpenAI
    from langchain_openai.llms.base import BaseOpenAI

    patches.replace(BaseChatOpenAI, "_get_request_payload", _with_headers)
    patches.replace(BaseOpenAI, "_invocation_params", _property_with_headers)
    patches.replace(BaseChatOpenAI, "_convert_chunk_to_generation_chunk", _with_response_id)


def _with_headers(original: Callable[..., Payload]) -> Callable[..., Payload]:
    @functools.wraps(original)
    def get_request_payload(*args: Any, **kwargs: Any) -> Payload:
        return _add_headers(original(*args, **kwargs))

    return get_request_payload


def _property_with_headers(original: property) -> property:
    getter: Callable[[Any], Payload] = original.__get__
    return property(lambda model: _add_headers(getter(model)), doc=original.__doc__)


def _add_headers(payload: Payload) -> Payload:
    """Our headers replace the client's of the same name: a constant `traceparent` could only be wrong."""
    with never_raises("a model request carries no traceparent"):
        if is_instrumentation_enabled():
            payload["extra_headers"] = {**(payload.get("extra_headers") or {}), **_headers()}
    return payload


def _headers() -> dict[str, str]:
    """Headers of the active call. Its request runs in a task of its own, which can be cancelled without the caller."""
    run = active_run()
    if run is not None and not run.is_chain:
        run.end_with_task()
    with agl.role(run.role) if run and run.role else nullcontext():
        return agl.headers()


def _with_response_id(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def convert_chunk(model: Any, chunk: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        with never_raises("the id of a streamed answer is not on its span"):
            _set_response_id(chunk.get("chunk") or chunk)
        return original(model, chunk, *args, **kwargs)

    return convert_chunk


def _set_response_id(chunk: Mapping[str, Any]) -> None:
    """Only for the first chunk, after which the call's run is no longer active.

    The calls of one `agenerate` share a context, so the call of a chunk is unknown: then no run is current.
    """
    run = active_run()
    if run is not None and run.call is not None and run.is_current() and (response_id := chunk.get("id")):
        run.span.set_attribute(semconv.GEN_AI_RESPONSE_ID, str(response_id))
