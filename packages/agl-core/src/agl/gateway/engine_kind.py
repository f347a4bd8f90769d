"""Kinds of engine: the request fields that ask for token ids, that pass a prompt of token ids, and that keep sampling
neutral.

`agl.tokens.capture` reads the responses of all kinds.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Final

from agl import semconv
from agl.tokens.capture import SGLANG_FIELDS, Json

_OVER_GENERATION_CONFIG: Final[Mapping[str, float]] = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
"""What a request leaves out, vLLM and SGLang take from the model's `generation_config.json`."""


class EngineKind(ABC):
    capture_fields: ClassVar[Mapping[str, Json]]
    """For each operation the request fields that ask for token ids and logprobs."""
    detokenized_field: ClassVar[str]
    """Field of the text in a response of /detokenize."""
    neutral_sampling: ClassVar[Mapping[str, float]] = _OVER_GENERATION_CONFIG
    """Fields with which the engine samples from the full distribution, whatever its defaults are."""
    masks_tool_calls: ClassVar[bool] = True
    """It masks tokens for a forced `tool_choice`, and for tools that are `strict`."""

    @abstractmethod
    def with_prompt(self, request: Json, ids: Sequence[int]) -> Json:
        """A chat completion sampled from the prompt `ids` instead of the chat template's output."""

    @abstractmethod
    def detokenize_body(self, ids: Sequence[int]) -> Json:
        """Body for /detokenize that keeps the text of special tokens."""


class Vllm(EngineKind):
    """vLLM 0.32. A chat takes prompt ids in the field meant for a prefill computed by a different engine."""

    capture_fields: ClassVar[Mapping[str, Json]] = {
        semconv.OPERATION_CHAT: {"return_token_ids": True, "logprobs": True},
        semconv.OPERATION_TEXT_COMPLETION: {"return_token_ids": True, "logprobs": 1},
    }
    detokenized_field = "prompt"

    def with_prompt(self, request: Json, ids: Sequence[int]) -> Json:
        return request | {"kv_transfer_params": (request.get("kv_transfer_params") or {}) | {"prompt_token_ids": ids}}

    def detokenize_body(self, ids: Sequence[int]) -> Json:
        return {"tokens": ids}


class Sglang(EngineKind):
    """SGLang since August 2026. Streamed chats reject `return_token_ids`, which completions need."""

    capture_fields: ClassVar[Mapping[str, Json]] = {
        semconv.OPERATION_CHAT: dict.fromkeys(SGLANG_FIELDS, True) | {"logprobs": True},
        semconv.OPERATION_TEXT_COMPLETION: {"return_token_ids": True, "logprobs": 1},
    }
    detokenized_field = "text"

    def with_prompt(self, request: Json, ids: Sequence[int]) -> Json:
        return request | {"input_ids": ids}

    def detokenize_body(self, ids: Sequence[int]) -> Json:
        return {"tokens": ids, "skip_special_tokens": False}


class Agl(Vllm):
    """The engine of this project. The prompt ends with the start of a forced tool call, so no token is masked."""

    neutral_sampling: ClassVar[Mapping[str, float]] = {}
    masks_tool_calls = False


ENGINE_KINDS: dict[str, EngineKind] = {"vllm": Vllm(), "sglang": Sglang(), "agl": Agl()}
"""By `kind` in the engine's configuration."""
