"""Kinds of engine: how each is asked for token ids. `agl.tokens.capture` reads the answers of all kinds."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

from agl import semconv
from agl.tokens.capture import SGLANG_FIELDS, Json


class Shape(Protocol):
    detokenized: ClassVar[str]
    """Field of the text in an answer of /detokenize."""

    @abstractmethod
    def ids(self, operation: str) -> Json:
        """The fields of a request that ask for the token ids of its prompt and answer."""

    @abstractmethod
    def with_prompt(self, request: Json, ids: Sequence[int]) -> Json:
        """A chat completion to be sampled from the prompt `ids` in place of what the chat template makes of it."""

    @abstractmethod
    def to_detokenize(self, ids: Sequence[int]) -> Json:
        """The body for /detokenize that keeps the text of special tokens."""


class Vllm(Shape):
    """vLLM 0.32. It takes prompts of chats from the field for a prefill that was done elsewhere."""

    detokenized = "prompt"

    def ids(self, operation: str) -> Json:
        return {"return_token_ids": True}

    def with_prompt(self, request: Json, ids: Sequence[int]) -> Json:
        given = request.get("kv_transfer_params") or {}
        return request | {"kv_transfer_params": given | {"prompt_token_ids": ids}}

    def to_detokenize(self, ids: Sequence[int]) -> Json:
        return {"tokens": ids}


class Sglang(Shape):
    """SGLang since August 2026. Streams of chats refuse `return_token_ids`, which completions need."""

    detokenized = "text"

    def ids(self, operation: str) -> Json:
        if operation == semconv.OPERATION_CHAT:
            return dict.fromkeys(SGLANG_FIELDS, True)
        return {"return_token_ids": True}

    def with_prompt(self, request: Json, ids: Sequence[int]) -> Json:
        return request | {"input_ids": ids}

    def to_detokenize(self, ids: Sequence[int]) -> Json:
        return {"tokens": ids, "skip_special_tokens": False}


SHAPES: dict[str, Shape] = {"vllm": Vllm(), "sglang": Sglang()}
"""By `kind` of the engine's configuration."""
