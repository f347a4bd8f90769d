"""Base of the APIs that are translated to chat completions and back."""

import json
from abc import abstractmethod
from typing import Any, ClassVar

from starlette.responses import JSONResponse, Response

from agl import semconv
from agl.gateway.dialect.dialect import Dialect
from agl.server.api_error import ApiError, error_text
from agl.tokens.capture import Capture, Choice, Json, RequestedFields


class Translated(Dialect):
    """One call that engines get as a chat completion with one choice; responses are rendered from `capture`."""

    operation = semconv.OPERATION_CHAT
    path = "/chat/completions"
    is_native = False
    api: ClassVar[str]
    """Name of the API in error messages."""

    def __init__(self, body: Json, model: str | None) -> None:
        self.body = body
        self.capture = Capture()
        try:
            self.request = self.translate(body) | ({"model": model} if model else {})
        except ValueError as error:
            raise self.not_translatable(str(error)) from error
        except (TypeError, AttributeError, KeyError) as error:
            raise self.not_translatable(f"it is not of the right form: {type(error).__name__}: {error}") from error
        if body.get("stream"):
            self.request |= {"stream": True, "stream_options": {"include_usage": True}}
        self.requested = RequestedFields.read(self.request, self.operation)

    @abstractmethod
    def translate(self, body: Json) -> Json:
        """The equivalent chat completion. Raises ValueError with the reason if there is none."""

    @abstractmethod
    def render_delta(self, choice: Json, delta: Json) -> bytes:
        """Events for a chunk's addition to the answer, which `capture` already has."""

    @classmethod
    def not_translatable(cls, reason: str) -> ApiError:
        message = f"this request to {cls.api} has no equivalent chat completion: {reason}"
        return ApiError(400, "not_translatable", message)

    @property
    def choice(self) -> Choice:
        """The answer as far as it has arrived."""
        return (self.capture.choices() or [Choice(0)])[0]

    def render_chunk(self, event: bytes, chunk: Json) -> bytes:
        return b"".join(self.render_delta(choice, choice.get("delta") or {}) for choice in chunk.get("choices") or ())

    def token_counts(self) -> tuple[int, int]:
        """Tokens of prompt and answer: the engine's usage, else the number of ids."""
        usage, choice = self.capture.usage, self.choice
        prompt = usage.get("prompt_tokens") or len(choice.prompt_ids)
        return prompt, usage.get("completion_tokens") or len(choice.token_ids)

    def engine_error(self, raw: bytes, status: int) -> bytes:
        return json.dumps(self.error_body(ApiError(status, str(status), error_text(raw)))).encode()

    @classmethod
    def error_response(cls, error: ApiError) -> Response:
        return JSONResponse(cls.error_body(error), error.http_status, error.headers())

    @classmethod
    @abstractmethod
    def error_body(cls, error: ApiError) -> Json:
        """An error in the form of the API."""


def text_of(content: Any) -> str:
    """The text of a string, or of a list of text parts."""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.get("text") or "" for part in content or ())


def function_tool(name: str, description: str | None, parameters: Any, strict: bool | None = None) -> Json:
    """A tool of a chat completion."""
    function = {"name": name, "description": description, "parameters": parameters, "strict": strict}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def tool_call(call_id: str, name: str, arguments: str) -> Json:
    """A tool call of an assistant's message."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
