"""Counts the tokens of a prompt without sampling, as the APIs that are translated have it."""

from typing import ClassVar, Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from agl.errors import AglError
from agl.gateway.dialect.messages import Messages
from agl.gateway.dialect.responses import Responses
from agl.gateway.dialect.translated import Translated
from agl.gateway.engine import forwarded
from agl.gateway.exchange import GatewayParts
from agl.gateway.request import read_json
from agl.gateway.tokenizer import Tokenizer, TokenizerError
from agl.server.api_error import ApiError
from agl.server.receiving import Reservation, long_work, peer_of
from agl.tokens.capture import Json

_TIMEOUT_S: Final = 30.0


class TokenCount:
    """ASGI endpoint that counts the tokens of a request's prompt. Nothing is recorded."""

    dialect: ClassVar[type[Translated]]
    head: ClassVar[Json] = {}
    """Fields of the response besides the number."""

    def __init__(self, parts: GatewayParts) -> None:
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response: Response = JSONResponse(self.head | {"input_tokens": await self._count(Request(scope, receive))})
        except ClientDisconnect:
            return
        except AglError as error:
            response = self.dialect.error_response(ApiError.of(error))
        await response(scope, receive, send)

    async def _count(self, request: Request) -> int:
        parts = self._parts
        with Reservation(parts.budget, peer_of(request.scope)) as reservation:
            data = await parts.read_body(request.scope, request.receive, reservation)
            return await self._count_body(request, data)

    async def _count_body(self, request: Request, data: bytes) -> int:
        parts = self._parts
        _, body = await long_work(len(data), read_json, data)
        model = parts.routes.resolve(str(body.get("model") or ""), parts.arms.versions)
        chat = (await long_work(len(data), self.dialect, body, model)).request
        engine = parts.routes.choose(model, None)
        tokenizer = Tokenizer(parts.session, engine, forwarded(request.headers), _TIMEOUT_S)
        try:
            return len(await tokenizer.tokenize(chat, chat["messages"]))
        except TokenizerError as error:
            raise ApiError(501, "no_tokenizer", f"the engine at {engine.url} does not count tokens: {error}") from error


class MessagesCount(TokenCount):
    dialect = Messages


class ResponsesCount(TokenCount):
    dialect = Responses
    head: ClassVar[Json] = {"object": "response.input_tokens"}
