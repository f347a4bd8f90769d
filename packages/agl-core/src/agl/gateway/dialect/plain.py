"""Chat completions and completions: the engine's own words, without what only the gateway asked for."""

import json
from dataclasses import replace
from typing import ClassVar

from starlette.responses import Response

from agl import semconv
from agl.gateway.dialect.dialect import Dialect
from agl.gateway.sse import to_event
from agl.server.api_error import ApiError
from agl.tokens.capture import Json, RequestedFields, is_empty_chunk, strip


class _Plain(Dialect):
    operation: ClassVar[str]
    is_native = True

    def __init__(self, body: Json, model: str | None) -> None:
        self.request = body
        self._asked = RequestedFields.read(body, self.operation)
        if model != self._asked.model:
            self.request = body | {"model": model}
            self._asked = replace(self._asked, sent_model=model)

    def whole(self, raw: bytes, answer: Json) -> bytes:
        return json.dumps(answer, separators=(",", ":")).encode() if strip(answer, self._asked) else raw

    def chunk(self, event: bytes, chunk: Json) -> bytes:
        if not strip(chunk, self._asked):
            return event + b"\n\n"
        return b"" if is_empty_chunk(chunk) else to_event(chunk)

    def end(self, done: bytes) -> bytes:
        return done and done + b"\n\n"

    def error(self, refusal: ApiError) -> bytes:
        return to_event(refusal.body())

    @classmethod
    def refusal(cls, refusal: ApiError) -> Response:
        return refusal.response()

    def refused(self, raw: bytes, status: int) -> bytes:
        return raw


class Chat(_Plain):
    operation = semconv.OPERATION_CHAT
    path = "/chat/completions"


class TextCompletion(_Plain):
    operation = semconv.OPERATION_TEXT_COMPLETION
    path = "/completions"
