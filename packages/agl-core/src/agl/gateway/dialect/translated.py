"""What the translated APIs share: an answer is put together from its parts, and rendered from that."""

from abc import abstractmethod
from typing import Any, ClassVar

from starlette.responses import JSONResponse, Response

from agl import semconv
from agl.gateway.dialect.dialect import Dialect
from agl.server.api_error import ApiError, error_message
from agl.tokens.capture import Capture, Choice, Json


class Translated(Dialect):
    """One call that engines are asked as a chat completion. The client has one choice."""

    operation = semconv.OPERATION_CHAT
    path = "/chat/completions"
    is_native = False
    api: ClassVar[str]
    """How the API is called in errors."""

    def __init__(self, body: Json, model: str | None) -> None:
        self.body = body
        self.capture = Capture()
        try:
            self.request = self.translate(body) | ({"model": model} if model else {})
        except ValueError as error:
            raise self.cannot(str(error)) from error
        except (TypeError, AttributeError, KeyError) as error:
            raise self.cannot(f"it is not of the right form: {type(error).__name__}: {error}") from error
        if body.get("stream"):
            self.request |= {"stream": True, "stream_options": {"include_usage": True}}

    @abstractmethod
    def translate(self, body: Json) -> Json:
        """The chat completion to ask for. Raises ValueError, saying why, where there is none like it."""

    @abstractmethod
    def delta(self, choice: Json, delta: Json) -> bytes:
        """The events for what a chunk adds to the answer; `capture` has it already."""

    @classmethod
    def cannot(cls, why: str) -> ApiError:
        """The refusal of a request that cannot be translated."""
        return ApiError(
            400, "not_translatable", f"this request to {cls.api} cannot be asked as a chat completion: {why}"
        )

    @property
    def choice(self) -> Choice:
        """What has arrived of the answer."""
        return (self.capture.choices() or [Choice(0)])[0]

    def chunk(self, event: bytes, chunk: Json) -> bytes:
        if chunk.get("error"):
            raise ApiError(502, "engine_error", error_message(chunk["error"]))
        self.capture.add(chunk)
        return b"".join(self.delta(choice, choice.get("delta") or {}) for choice in chunk.get("choices") or ())

    def tokens(self) -> tuple[int, int]:
        """Tokens of prompt and answer: as the engine states them, else counted."""
        usage, choice = self.capture.usage, self.choice
        return (
            usage.get("prompt_tokens") or len(choice.prompt_ids),
            usage.get("completion_tokens") or len(choice.token_ids),
        )

    @classmethod
    def refusal(cls, refusal: ApiError) -> Response:
        return JSONResponse(cls.error_body(refusal), refusal.http_status, refusal.headers())

    @classmethod
    @abstractmethod
    def error_body(cls, refusal: ApiError) -> Json:
        """A refusal as the API has errors."""


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
