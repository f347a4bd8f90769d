"""Kinds of engine: the request fields that ask for token ids, and those that pass a prompt of token ids.

`agl.tokens.capture` reads the responses of all kinds.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from agl import semconv
from agl.tokens.capture import SGLANG_FIELDS, Json


class EngineKind(ABC):
    capture_fields: ClassVar[Mapping[str, Json]]
    """For each operation the request fields that ask for token ids and logprobs."""
    detokenized_field: ClassVar[str]
    """Field of the text in a response of /detokenize."""

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


ENGINE_KINDS: dict[str, EngineKind] = {"vllm": Vllm(), "sglang": Sglang()}
"""By `kind` in the engine's configuration."""
