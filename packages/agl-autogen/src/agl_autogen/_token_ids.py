"""Token ids of a call: requested from the engine, captured from its response, and hidden from the user."""

from collections.abc import Mapping
from typing import Any

from autogen_core.models import CreateResult
from opentelemetry.util.types import AttributeValue

from agl import semconv
from agl.tokens.capture import Capture, Json


class TokenIdCapture:
    """The captured response of one call, whole or in chunks, and the fields that only we requested."""

    def __init__(self) -> None:
        self._captured = Capture()
        self._hidden: frozenset[str] = frozenset()
        """Fields of the response that we requested and the user did not."""

    def request(self, create_args: Json) -> None:
        """Request token ids and logprobs, in vLLM's form."""
        body = create_args.get("extra_body") or {}
        if not body.get("return_token_ids"):
            create_args["extra_body"] = {**body, "return_token_ids": True}
            self._hidden |= {"prompt_token_ids", "token_ids"}
        if not create_args.get("logprobs"):
            create_args["logprobs"] = True
            self._hidden |= {"logprobs"}

    def capture_response(self, response: Mapping[str, Any]) -> Mapping[str, Any]:
        """Capture a whole response (`model_dump()` of the client library); return it with the hidden fields null."""
        choices = response.get("choices") or []
        self._captured.add_whole({**response, "choices": [{**choice, "message": None} for choice in choices]})
        if not self._hidden:
            return response
        # null, because that is vLLM's value for a field that is not requested
        return _nulled(response, self._hidden) | {"choices": [_nulled(choice, self._hidden) for choice in choices]}

    def capture_chunk(self, chunk: Any) -> None:
        """Capture a `ChatCompletionChunk` of the `openai` package, and hide its logprobs if only we requested them."""
        # not `model_dump`, and nothing for a chunk of text alone: this runs for each token
        choices = [_token_fields(choice) for choice in chunk.choices if choice.logprobs or choice.model_extra]
        if choices or chunk.model_extra or self._captured.response_id is None:
            self._captured.add({"id": chunk.id, "model": chunk.model, **(chunk.model_extra or {}), "choices": choices})
        if "logprobs" in self._hidden:
            for choice in chunk.choices:
                choice.logprobs = None

    def hide(self, result: CreateResult) -> CreateResult:
        """`result` without logprobs if only we requested them."""
        if "logprobs" in self._hidden:
            result.logprobs = None
        return result

    def attributes(self) -> dict[str, AttributeValue]:
        """Response id and model; token ids and logprobs of the first choice, which is the one that AutoGen reads."""
        captured = self._captured
        names = {semconv.GEN_AI_RESPONSE_ID: captured.response_id, semconv.GEN_AI_RESPONSE_MODEL: captured.model}
        found: dict[str, AttributeValue] = {key: name for key, name in names.items() if isinstance(name, str)}
        for choice in captured.choices()[:1]:
            found |= choice.token_attributes()
            if not choice.token_ids:  # logprobs alone cannot be trained on
                found.pop(semconv.RESPONSE_LOGPROBS, None)
        return found


def _token_fields(choice: Any) -> Json:
    tokens = (choice.logprobs and choice.logprobs.content) or ()
    logprobs = {"content": [{"logprob": token.logprob} for token in tokens]}
    return {**(choice.model_extra or {}), "index": choice.index, "logprobs": logprobs}


def _nulled(fields: Mapping[str, Any], names: frozenset[str]) -> Json:
    return {name: None if name in names else value for name, value in fields.items()}
