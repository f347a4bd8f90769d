"""Who gets to the app: those with a token that allows it, and no page of another site."""

from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from agl.server.api_error import ApiError
from agl.server.bearer import BearerTokens, Right

HEALTH: Final = "/api/health"
_PROJECT: Final = "agl.project"
_AUTHORIZATION: Final = b"authorization"
_API_KEY: Final = b"x-api-key"
"""Where clients of Anthropic's API put their token."""
_MODELS: Final = ("/v1/", "/rollout/")
_READING: Final = ("GET", "HEAD")


class Guard:
    """`app` for those who have one of `tokens`, which are ours: engines get to see none. Health is for everybody.

    A request that a browser makes for a page of another site is refused, since no site is allowed (CORS).
    """

    def __init__(self, app: ASGIApp, tokens: BearerTokens) -> None:
        self._app = app
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == HEALTH:
            return await self._app(scope, receive, send)
        try:
            scope = self._admit(scope)
        except ApiError as refusal:
            return await refusal.response()(scope, receive, send)
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> Scope:
        """The scope as the app gets it: without the token, with its project. Raises ApiError."""
        headers = dict(scope["headers"])
        origin = headers.get(b"origin")
        if origin is not None and origin.partition(b"://")[2] != headers.get(b"host"):
            raise ApiError(403, "cross_origin", f"pages of {origin.decode('latin-1')} may not call this server")
        if not self._tokens:
            return scope
        given = headers.get(_AUTHORIZATION) or (b"Bearer " + headers[_API_KEY] if _API_KEY in headers else None)
        grant, right = self._tokens.grant(given), _needed(scope)
        if grant is None:
            raise ApiError(401, "invalid_api_key", "a token is needed: set the client's api_key to it")
        if not grant.allows(right):
            raise ApiError(403, "insufficient_scope", f"{scope['method']} {scope['path']} needs the scope {right}")
        kept = [(name, value) for name, value in scope["headers"] if name not in (_AUTHORIZATION, _API_KEY)]
        return {**scope, "headers": kept, _PROJECT: grant.project}


def project_of(scope: Scope) -> str | None:
    """The project of the token that a request came with."""
    return scope.get(_PROJECT)


def _needed(scope: Scope) -> Right:
    if scope["path"].startswith(_MODELS):
        return Right.AGENT
    return Right.READ if scope["method"] in _READING else Right.TRAINER
