"""What a server answered beyond AutoGen's `CreateResult`: ids, model, and token ids in vLLM's shape."""

from collections.abc import Mapping
from typing import Any

from opentelemetry.util.types import AttributeValue

from agl import semconv
from agl.tokens.packing import pack_ids, pack_logprobs


class Answer:
    """One answer, gathered from a whole response or from the chunks of a stream; only choice 0, as AutoGen reads it."""

    def __init__(self) -> None:
        self._response_id: str | None = None
        self._model: str | None = None
        self._prompt_ids: list[int] = []
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []

    def note_response(self, response: Mapping[str, Any]) -> None:
        """Read a response as AutoGen logs it: the client library's `model_dump()`."""
        self._note_head(response.get("id"), response.get("model"), response.get("prompt_token_ids"))
        for choice in (response.get("choices") or [])[:1]:
            content = (choice.get("logprobs") or {}).get("content") or []
            self._note_tokens(choice.get("token_ids"), [token["logprob"] for token in content])

    def note_chunk(self, chunk: Any) -> None:
        """Read an `openai` `ChatCompletionChunk`; vLLM sends the prompt's ids with the first one."""
        self._note_head(chunk.id, chunk.model, (chunk.model_extra or {}).get("prompt_token_ids"))
        for choice in chunk.choices:
            if choice.index == 0:
                content = (choice.logprobs and choice.logprobs.content) or []
                self._note_tokens((choice.model_extra or {}).get("token_ids"), [token.logprob for token in content])

    def attributes(self) -> dict[str, AttributeValue]:
        """Span attributes of what was seen."""
        found: dict[str, AttributeValue | None] = {
            semconv.GEN_AI_RESPONSE_ID: self._response_id,
            semconv.GEN_AI_RESPONSE_MODEL: self._model,
            semconv.PROMPT_TOKEN_IDS: pack_ids(self._prompt_ids) if self._prompt_ids else None,
            semconv.RESPONSE_TOKEN_IDS: pack_ids(self._token_ids) if self._token_ids else None,
            semconv.RESPONSE_LOGPROBS: pack_logprobs(self._logprobs) if self._token_ids and self._logprobs else None,
        }
        return {name: value for name, value in found.items() if value is not None}

    def _note_head(self, response_id: Any, model: Any, prompt_ids: list[int] | None) -> None:
        self._response_id = response_id if isinstance(response_id, str) else self._response_id
        self._model = model if isinstance(model, str) else self._model
        self._prompt_ids = prompt_ids or self._prompt_ids

    def _note_tokens(self, token_ids: list[int] | None, logprobs: list[float]) -> None:
        self._token_ids.extend(token_ids or [])
        self._logprobs.extend(logprobs)
