"""Base of the APIs that are translated to chat completions and back."""

import json
import random
from abc import abstractmethod
from typing import Any, ClassVar

from starlette.responses import JSONResponse, Response

from agl import semconv
from agl.gateway.dialect.api_field import Fields
from agl.gateway.dialect.dialect import Dialect
from agl.server.api_error import ApiError, error_text
from agl.tokens.capture import Capture, CapturedToolCall, Choice, Json, RequestedFields, read_texts


class Translated(Dialect):
    """One call that engines get as a chat completion with one choice; responses are rendered from `capture`."""

    operation = semconv.OPERATION_CHAT
    path = "/chat/completions"
    is_native = False
    api: ClassVar[str]
    """Name of the API in error messages."""
    fields: ClassVar[Fields]
    """What becomes of the API's fields."""

    def __init__(self, body: Json, model: str | None) -> None:
        self.body = body
        self.streams = bool(body.get("stream"))
        self.capture = Capture()
        self._key = random.getrandbits(64)
        """Tells the calls of this response from those of others."""
        self.whole_calls: set[str] = set()
        """Names of tools whose calls are rendered when their arguments are complete."""
        self._number = 0
        """Number of the tool call that is being rendered."""
        self._rendered: int | None = None
        """How many pieces of it have been rendered; None: it has not started."""
        self._later: list[tuple[Json, str, str]] = []
        """Texts that arrived within a tool call."""
        try:
            self.request = self.translate(body) | ({"model": model} if model else {})
        except ValueError as error:
            raise self.not_translatable(str(error)) from error
        except (TypeError, AttributeError, KeyError) as error:
            raise self.not_translatable(f"it is not of the right form: {type(error).__name__}: {error}") from error
        if self.streams:
            self.request |= {"stream": True, "stream_options": {"include_usage": True}}
        self.requested = RequestedFields.read(self.request, self.operation)

    @abstractmethod
    def translate(self, body: Json) -> Json:
        """The equivalent chat completion. Raises ValueError with the reason if there is none."""

    @abstractmethod
    def render_text(self, choice: Json, text: str, thoughts: str) -> bytes:
        """Events for what the `choice` of a chunk adds to text and thoughts, or for the start of the response."""

    @abstractmethod
    def render_call(self, number: int, call: CapturedToolCall, piece: str) -> bytes:
        """Events for the next piece of a tool call's arguments, which starts the call if it has not started."""

    @classmethod
    def not_translatable(cls, reason: str) -> ApiError:
        message = f"this request to {cls.api} has no equivalent chat completion: {reason}"
        return ApiError(400, "not_translatable", message)

    @property
    def choice(self) -> Choice:
        """The answer as far as it has arrived."""
        return (self.capture.choices() or [Choice(0)])[0]

    @abstractmethod
    def render_message(self, response: Json) -> bytes:
        """The body for a client that requested no stream."""

    def render_whole(self, raw: bytes, response: Json) -> bytes:
        """Some engines answer a request for a stream, if it has tools, with a whole response."""
        if not self.streams:
            return self.render_message(response)
        choices = [choice | {"delta": choice.get("message")} for choice in response["choices"]]
        return self.render_chunk(b"", {"choices": choices}) + self.render_end(b"")

    def render_chunk(self, event: bytes, chunk: Json) -> bytes:
        events = b""
        for choice in chunk.get("choices") or ():
            text, thoughts = read_texts(choice.get("delta") or {})
            if (text or thoughts) and self._is_within_call:
                self._later.append((choice, text, thoughts))
            else:
                events += self.render_text(choice, text, thoughts)
            events += self._render_calls(is_end=False)
        return events

    def render_rest(self) -> bytes:
        """Events for what has arrived and was held back until the end of the answer."""
        return self._render_calls(is_end=True) + b"".join(self.render_text(*one) for one in self._later)

    @property
    def _is_within_call(self) -> bool:
        return self._rendered is not None and not self.choice.tool_calls[self._number].is_complete

    def _render_calls(self, is_end: bool) -> bytes:
        """Events for what has arrived of the tool calls. Clients expect one after the other, and engines may interleave
        them: each waits until those before it are complete."""
        events, calls = b"", self.choice.tool_calls
        while self._number < len(calls):
            call = calls[self._number]
            is_done = is_end or (self._number + 1 < len(calls) and call.is_complete)
            if is_done or (call.name and call.name not in self.whole_calls):
                if self._rendered is None or self._rendered < len(call.pieces):
                    events += self.render_call(self._number, call, "".join(call.pieces[self._rendered or 0 :]))
                self._rendered = len(call.pieces)
            if not is_done:
                break
            self._number, self._rendered = self._number + 1, None
        return events

    def call_id(self, number: int, call: CapturedToolCall) -> str:
        """Id of a tool call; some engines give it none, and its result must name it."""
        return call.id or f"call_{self._key:016x}_{number}"

    def token_counts(self) -> tuple[int, int]:
        """Tokens of prompt and answer: the engine's usage, else the number of ids."""
        usage, choice = self.capture.usage, self.choice
        prompt = usage.get("prompt_tokens") or len(choice.prompt_ids)
        return prompt, usage.get("completion_tokens") or len(choice.token_ids)

    def token_detail(self, details: str, name: str) -> int:
        """A part of the engine's usage; 0 if it states none."""
        stated = self.capture.usage.get(details)
        return stated.get(name) or 0 if isinstance(stated, dict) else 0

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
