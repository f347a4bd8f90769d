"""Authentication by bearer token: what each token grants, and the check of every HTTP request."""

import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from agl.errors import ConfigError
from agl.server.api_error import ApiError

HEALTH: Final = "/api/health"
_PROJECT: Final = "agl.project"
_AUTHORIZATION: Final = b"authorization"
_API_KEY: Final = b"x-api-key"
"""Header in which clients of Anthropic's API send their token."""
_MODEL_PATHS: Final = ("/v1/", "/rollout/")
_READING: Final = ("GET", "HEAD")
_SCHEME: Final = b"bearer"


class Right(StrEnum):
    """A scope of a token."""

    AGENT = "agent"
    """Call models and send spans."""
    TRAINER = "trainer"
    """Everything."""
    READ = "read"
    """Read from the API."""


@dataclass(frozen=True, slots=True)
class Grant:
    """The rights of a token, and its project; None: all projects."""

    rights: frozenset[Right] = frozenset({Right.TRAINER})
    project: str | None = None

    def allows(self, right: Right) -> bool:
        return right in self.rights or Right.TRAINER in self.rights


class BearerTokens:
    """The tokens that a server accepts, and what each grants. Without tokens the server accepts every request."""

    def __init__(self, tokens: Iterable[str] | Mapping[str, Grant] = ()) -> None:
        grants = tokens if isinstance(tokens, Mapping) else dict.fromkeys(tokens, Grant())
        self._grants = {token.encode(): grant for token, grant in grants.items()}

    @classmethod
    def read(cls, token: str | None, path: Path | None) -> "BearerTokens":
        """`token`, which grants everything, and the tokens in the file `path`, one per line: token, scopes, project.

        Scopes are comma-separated: `agent`, `trainer`, `read`; a line without scopes grants everything. Raises
        ConfigError if the token is empty or a line is invalid.
        """
        if token is not None and not token.strip():
            raise ConfigError("the token is empty; pass the secret itself, or no token at all")
        return cls((_read_lines(path) if path else {}) | ({token.strip(): Grant()} if token else {}))

    def __bool__(self) -> bool:
        return bool(self._grants)

    def grant(self, authorization: bytes | None) -> Grant | None:
        """The grant of an `Authorization` header; None if its token is unknown. Takes the same time for every token."""
        if not self._grants:
            return Grant()
        scheme, _, given = (authorization or b"").partition(b" ")
        matches = [grant for token, grant in self._grants.items() if hmac.compare_digest(given.strip(), token)]
        return matches[0] if matches and scheme.lower() == _SCHEME else None

    def admit(self, authorization: bytes | None, right: Right = Right.AGENT) -> bool:
        """Whether this `Authorization` header grants `right`."""
        grant = self.grant(authorization)
        return grant is not None and grant.allows(right)


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


def is_loopback(host: str) -> bool:
    """Whether a server that listens on `host` can be reached from this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_lines(path: Path) -> dict[str, Grant]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the tokens in {path}: {error}") from error
    grants = dict(_read_line(path, number, line) for number, line in enumerate(lines, 1) if line.strip())
    if not grants:
        raise ConfigError(f"{path} holds no token; write one per line, or remove token_file from the configuration")
    return grants


def _read_line(path: Path, number: int, line: str) -> tuple[str, Grant]:
    token, *rest = line.split()  # An error must not show the token.
    known = ", ".join(Right)
    if len(rest) > 2:
        raise ConfigError(
            f"{path}, line {number}: expected token, scopes ({known}) and project, got {len(rest)} words after it"
        )
    try:
        rights = frozenset(map(Right, rest[0].split(","))) if rest else Grant().rights
    except ValueError as error:
        raise ConfigError(f"{path}, line {number}: the scopes are {rest[0]!r}, expected some of {known}") from error
    return token, Grant(rights, rest[1] if len(rest) == 2 else None)
