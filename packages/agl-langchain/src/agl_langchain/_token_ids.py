"""`capture_token_ids`: token ids on the spans of a chat model that calls its engine without a gateway."""

import functools
import types
from typing import TYPE_CHECKING, TypeVar

from langchain_core.language_models import BaseChatModel

from agl.errors import ConfigError

if TYPE_CHECKING:
    from langchain_openai.chat_models.base import BaseChatOpenAI

Model = TypeVar("Model", bound=BaseChatModel)


def capture_token_ids(chat_model: Model) -> Model:
    """Make `chat_model` (a `ChatOpenAI`) request token ids and logprobs from vLLM, and return it.

        model = capture_token_ids(ChatOpenAI(model="planner", base_url=vllm_url))

    The `chat` span of each traced call then holds them, packed: `agl.prompt.token_ids`, `agl.response.token_ids`,
    `agl.response.logprobs`. If a request asks for `n` choices, each choice has a child span. The agent sees the same as
    without capture. `redact` and `capture_content` do not apply to token ids, which anyone with the tokenizer can read.

    Changes this object only, in place. Not needed with the gateway. An engine that does not know `return_token_ids` may
    refuse the requests; the Responses API returns no ids. Raises ConfigError if the model is not of `langchain_openai`.
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
    # not setattr: pydantic would treat it as a field
    object.__setattr__(chat_model, "__class__", _capturing(type(chat_model)))
    return chat_model


@functools.cache
def _capturing(kind: type["BaseChatOpenAI"]) -> type["BaseChatOpenAI"]:
    """`kind` with capture, under the same name, because LangChain and its users read the name."""
    from agl_langchain._capturing_model import CapturingChatModel

    if issubclass(kind, CapturingChatModel):
        return kind
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return types.new_class(kind.__name__, (CapturingChatModel, kind), exec_body=lambda body: body.update(named))
