"""Authentication of HTTP requests by bearer token, and protection against requests from pages of other sites."""

from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from agl.server.api_error import ApiError
from agl.server.bearer import BearerTokens, Right

HEALTH: Final = "/api/health"
_PROJECT: Final = "agl.project"
_AUTHORIZATION: Final = b"authorization"
_API_KEY: Final = b"x-api-key"
"""Header in which clients of Anthropic's API send their token."""
_MODEL_PATHS: Final = ("/v1/", "/rollout/")
_READING: Final = ("GET", "HEAD")


class AuthMiddleware:
    """Passes a request on to `app` if it has one of `tokens` with the right that the request needs.

    The token is removed from the request, so that no engine sees it. `/api/health` needs no token. Cross-origin
    requests of browsers are rejected: no site is allowed (CORS).
    """

    def __init__(self, app: ASGIApp, tokens: BearerTokens) -> None:
        self._app = app
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == HEALTH:
            return await self._app(scope, receive, send)
        try:
            scope = self._authorized(scope)
        except ApiError as error:
            return await error.response()(scope, receive, send)
        await self._app(scope, receive, send)

    def _authorized(self, scope: Scope) -> Scope:
        """The scope with the token's project in place of the token. Raises ApiError."""
        headers = dict(scope["headers"])
        origin = headers.get(b"origin")
        if origin is not None and origin.partition(b"://")[2] != headers.get(b"host"):
            raise ApiError(403, "cross_origin", f"pages of {origin.decode('latin-1')} may not call this server")
        if not self._tokens:
            return scope
        given = headers.get(_AUTHORIZATION) or (b"Bearer " + headers[_API_KEY] if _API_KEY in headers else None)
        grant, right = self._tokens.grant(given), _needed_right(scope)
        if grant is None:
            raise ApiError(401, "invalid_api_key", "a token is needed: set the client's api_key to it")
        if not grant.allows(right):
            raise ApiError(403, "insufficient_scope", f"{scope['method']} {scope['path']} needs the scope {right}")
        kept = [(name, value) for name, value in scope["headers"] if name not in (_AUTHORIZATION, _API_KEY)]
        return {**scope, "headers": kept, _PROJECT: grant.project}


def project_of(scope: Scope) -> str | None:
    """The project of the request's token."""
    return scope.get(_PROJECT)


def _needed_right(scope: Scope) -> Right:
    if scope["path"].startswith(_MODEL_PATHS):
        return Right.AGENT
    return Right.READ if scope["method"] in _READING else Right.TRAINER
