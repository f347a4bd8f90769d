"""The id of a streamed answer of `ChatOpenAI`: it stands in the first chunk, and LangChain shows it to no callback."""

import functools
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from agl import semconv
from agl.failsafe import never_raises
from agl_langchain._patch import Undo, replace
from agl_langchain._run import run_in_force


def note_ids_of_streams() -> list[Undo]:
    """From now on the span of a streamed call has the id of its answer. Returns what takes that back.

    Does nothing where `langchain_openai` is not installed.
    """
    if find_spec("langchain_openai") is None:
        return []
    from langchain_openai.chat_models.base import BaseChatOpenAI

    return [replace(BaseChatOpenAI, "_convert_chunk_to_generation_chunk", _noting_id)]


def _noting_id(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def convert_chunk(model: Any, chunk: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        with never_raises("the id of a streamed answer is not on its span"):
            _note_id(chunk.get("chunk") or chunk)
        return original(model, chunk, *args, **kwargs)

    return convert_chunk


def _note_id(chunk: Mapping[str, Any]) -> None:
    """Only of the first chunk: with it the answer begins, and the call is no longer in force.

    The calls of one `agenerate` share a context, which does not say whose chunk it is: there none is current.
    """
    run = run_in_force()
    if run is not None and run.call is not None and run.is_current() and (response_id := chunk.get("id")):
        run.span.set_attribute(semconv.GEN_AI_RESPONSE_ID, str(response_id))
