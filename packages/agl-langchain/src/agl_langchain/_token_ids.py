"""Token ids on the spans of a chat model that talks to its engine without a gateway between."""

import functools
import types
from typing import TYPE_CHECKING, TypeVar

from langchain_core.language_models import BaseChatModel

from agl.errors import ConfigError

if TYPE_CHECKING:
    from langchain_openai.chat_models.base import BaseChatOpenAI

Model = TypeVar("Model", bound=BaseChatModel)


def capture_token_ids(chat_model: Model) -> Model:
    """Have `chat_model` (a `ChatOpenAI`) ask a vLLM-like engine for token ids and logprobs, and return it.

    They stand on the `chat` span of each call that a handler of ours hears of, packed: `agl.prompt.token_ids`,
    `agl.response.token_ids`, `agl.response.logprobs`. Where a request asks for `n` choices, each has a span of its own
    below that one. The answer itself shows what it showed before. `redact` and `capture_content` do not apply: who has
    the tokenizer can read token ids.

    The model is changed in place, and no other is. An engine that refuses `return_token_ids` refuses its requests;
    behind the gateway this is not needed. Calls of the Responses API have no ids to capture. Raises ConfigError for
    anything but a chat model of `langchain_openai`.
    """
    try:
        from langchain_openai.chat_models.base import BaseChatOpenAI
    except ImportError:
        raise ConfigError("capture_token_ids needs langchain-openai: pip install langchain-openai") from None
    if not isinstance(chat_model, BaseChatOpenAI):
        kind = type(chat_model).__name__
        raise ConfigError(
            f"the model is {kind}, expected a ChatOpenAI itself, before tools or a schema are bound to it"
        )
    # not setattr: pydantic takes that for a field
    object.__setattr__(chat_model, "__class__", _capturing(type(chat_model)))
    return chat_model


@functools.cache
def _capturing(kind: type["BaseChatOpenAI"]) -> type["BaseChatOpenAI"]:
    """`kind` with capture, under its own name, which LangChain and its users read."""
    from agl_langchain._capturing_model import CapturingChatModel

    if issubclass(kind, CapturingChatModel):
        return kind
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return types.new_class(kind.__name__, (CapturingChatModel, kind), exec_body=lambda body: body.update(named))
