"""Who may send requests: the names under which a server is addressed, and bearer tokens with what each grants."""

import hmac
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from ipaddress import ip_address
from pathlib import Path
from typing import Final
from urllib.parse import urlencode, urlsplit

from starlette.requests import cookie_parser
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from agl.config.section import DEFAULT_PROJECT, NAME_RULE, is_name
from agl.errors import ConfigError
from agl.server.api_error import ApiError

HEALTH: Final = "/api/health"
_PROJECT: Final = "agl.project"
_AUTHORIZATION: Final = b"authorization"
_API_KEY: Final = b"x-api-key"
"""Header in which clients of Anthropic's API send their token."""
LOGIN: Final = "/login"
STATIC: Final = "/static"
"""Paths of the page that need no token."""
COOKIE: Final = "agl_session"
_MODEL_PATHS: Final = ("/v1/", "/rollout/")
_READING: Final = ("GET", "HEAD")
_SHARED_PATHS: Final = ("/api/gateway", "/metrics")
"""They are about the server and the engines of all projects."""


class Right(StrEnum):
    """A scope of a token."""

    AGENT = "agent"
    """Call models and send spans."""
    TRAINER = "trainer"
    """Everything in its project, and steer the gateway if that is the default one."""
    READ = "read"
    """Read from the API."""


@dataclass(frozen=True, slots=True)
class Grant:
    """The rights of a token in its project."""

    rights: frozenset[Right] = frozenset({Right.TRAINER})
    project: str = DEFAULT_PROJECT

    def allows(self, right: Right) -> bool:
        return right in self.rights or Right.TRAINER in self.rights


class BearerTokens:
    """The tokens that a server accepts, and what each grants. Without tokens the server accepts every request."""

    def __init__(self, tokens: Iterable[str] | Mapping[str, Grant] = (), scheme: bytes = b"bearer") -> None:
        grants = tokens if isinstance(tokens, Mapping) else dict.fromkeys(tokens, Grant())
        self._grants = {token.encode(): grant for token, grant in grants.items()}
        self._scheme = scheme

    @classmethod
    def read(cls, token: str | None, path: Path | None) -> "BearerTokens":
        """`token`, which grants everything, and the tokens in the file `path`, one per line: token, scopes, project.

        Scopes are comma-separated: `agent`, `trainer`, `read`; a line without scopes grants everything. What follows a
        `#` at the start of a word is a comment. Raises ConfigError if the token is empty or a line is invalid.
        """
        if token is not None and not token.strip():
            raise ConfigError("the token is empty; pass the secret itself, or no token at all")
        return cls((_read_lines(path) if path else {}) | ({token.strip(): Grant()} if token else {}))

    def __bool__(self) -> bool:
        return bool(self._grants)

    @property
    def projects(self) -> frozenset[str]:
        """The projects of the tokens."""
        return frozenset(grant.project for grant in self._grants.values())

    def grant(self, authorization: bytes | None) -> Grant | None:
        """The grant of an `Authorization` header; None if its token is unknown. Takes the same time for every token."""
        if not self._grants:
            return Grant()
        scheme, _, given = (authorization or b"").partition(b" ")
        matches = [grant for token, grant in self._grants.items() if hmac.compare_digest(given.strip(), token)]
        return matches[0] if matches and scheme.lower() == self._scheme else None

    def session(self, token: str) -> str | None:
        """Value of the page's cookie for `token`, from which nobody can compute the token; None if it may not read."""
        grant = self.grant(b"bearer " + token.encode())
        return _session(token.encode()) if grant and grant.allows(Right.READ) else None

    def session_grant(self, session: str) -> Grant | None:
        """The grant of a cookie: to read what its token may read. None if no token has it."""
        matches = [
            grant
            for token, grant in self._grants.items()
            if hmac.compare_digest(session.encode(), _session(token).encode())
        ]
        return Grant(frozenset({Right.READ}), matches[0].project) if matches and matches[0].allows(Right.READ) else None


def _session(token: bytes) -> str:
    return hmac.digest(token, b"agl page", "sha256").hex()


class AuthMiddleware:
    """Passes a request on to `app` if it has one of `tokens` with the right that the request needs.

    The token is removed from the request, so that no engine sees it. `/api/health` and the page's login need no token;
    a browser without one is sent to the login, whose cookie lets it read. Cross-origin requests of browsers are
    rejected: no site is allowed (CORS).
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
            is_page = error.http_status == HTTPStatus.UNAUTHORIZED and asks_for_page(scope)
            response = RedirectResponse(_login_url(scope), HTTPStatus.SEE_OTHER) if is_page else error.response()
            return await response(scope, receive, send)
        await self._app(scope, receive, send)

    def _authorized(self, scope: Scope) -> Scope:
        """The scope with the token's project in place of the token. Raises ApiError."""
        headers = dict(scope["headers"])
        origin = headers.get(b"origin")
        if origin is not None and origin.partition(b"://")[2] != headers.get(b"host"):
            raise ApiError(403, "cross_origin", f"pages of {origin.decode('latin-1')} may not call this server")
        if not self._tokens or scope["path"] == LOGIN or scope["path"].startswith(f"{STATIC}/"):
            return scope
        given = headers.get(_AUTHORIZATION) or (b"Bearer " + headers[_API_KEY] if _API_KEY in headers else None)
        session = cookie_parser(headers.get(b"cookie", b"").decode("latin-1")).get(COOKIE)
        grant, right = self._tokens.grant(given), _needed_right(scope)
        if given is None and session and scope["method"] in _READING:
            grant = self._tokens.session_grant(session)
        if grant is None:
            raise ApiError(401, "invalid_api_key", "a token is needed: set the client's api_key to it")
        if not grant.allows(right):
            raise ApiError(403, "insufficient_scope", f"{scope['method']} {scope['path']} needs the scope {right}")
        if grant.project != DEFAULT_PROJECT and scope["path"].startswith(_SHARED_PATHS):
            message = f"{scope['path']} is about all projects, and needs a token without a project"
            raise ApiError(403, "insufficient_scope", message)
        kept = [(name, value) for name, value in scope["headers"] if name not in (_AUTHORIZATION, _API_KEY)]
        return {**scope, "headers": kept, _PROJECT: grant.project}


def project_of(scope: Scope) -> str:
    """The project of the request's token."""
    return scope.get(_PROJECT, DEFAULT_PROJECT)


def asks_for_page(scope: Scope) -> bool:
    """Whether a browser sent the request, for a person to read."""
    accepted = b"".join(value for name, value in scope["headers"] if name == b"accept")
    return scope["method"] in _READING and b"text/html" in accepted


def _needed_right(scope: Scope) -> Right:
    if scope["path"].startswith(_MODEL_PATHS):
        return Right.AGENT
    return Right.READ if scope["method"] in _READING else Right.TRAINER


def _login_url(scope: Scope) -> str:
    query = scope["query_string"].decode("latin-1")
    return f"{LOGIN}?{urlencode({'next': scope['path'] + (f'?{query}' if query else '')})}"


def is_loopback(host: str) -> bool:
    """Whether a server that listens on `host` can be reached from this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class AllowedHosts:
    """The names of a server that listens on `host`: those of loopback, `host` itself, and `more`.

    A web page can make its own name resolve to 127.0.0.1 (DNS rebinding). Its requests then reach a server on loopback,
    from the same origin for the browser. They still carry the page's name, which is refused here.

    If `host` is all addresses of this machine, these are the machine's name and every numeric address, too: no page can
    have an address for its name.
    """

    def __init__(self, host: str, more: Iterable[str] = ()) -> None:
        self._is_any = host in ("0.0.0.0", "::")
        names = [host, *more] + ([socket.gethostname(), socket.getfqdn()] if self._is_any else [])
        self._names = {name.lower().rstrip(".") for name in names}

    def check(self, authorities: list[str]) -> None:
        """Raises ApiError unless `authorities`, the `Host` headers of a request, are one allowed name."""
        if len(authorities) != 1 or not self._admits(authorities[0]):
            got = ", ".join(map(repr, authorities)) or "no host"
            raise ApiError(
                421, "unknown_host", f"the request is for {got}; use 127.0.0.1, or add the name to server.allowed_hosts"
            )

    def _admits(self, authority: str) -> bool:
        try:
            host = (urlsplit(f"//{authority}").hostname or "").rstrip(".")
        except ValueError:
            return False
        return host in self._names or is_loopback(host) or (self._is_any and _is_address(host))


class HostsMiddleware:
    """Passes a request on to `app` if it is for one of `hosts`."""

    def __init__(self, app: ASGIApp, hosts: AllowedHosts) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            try:
                if hosts or scope["http_version"] != "1.0":  # HTTP/1.0 needs no host; all browsers send one.
                    self._hosts.check(hosts)
            except ApiError as error:
                return await error.response()(scope, receive, send)
        await self._app(scope, receive, send)


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _read_lines(path: Path) -> dict[str, Grant]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the tokens in {path}: {error}") from error
    words = [re.split(r"(?<!\S)#", line)[0].split() for line in lines]
    grants = dict(_read_line(f"{path}, line {number}", *line) for number, line in enumerate(words, 1) if line)
    if not grants:
        raise ConfigError(f"{path} holds no token; write one per line, or remove token_file from the configuration")
    return grants


def _read_line(
    place: str, token: str, scopes: str = "", project: str = DEFAULT_PROJECT, *more: str
) -> tuple[str, Grant]:
    # An error shows no word of the line: each may be a token.
    try:
        rights = frozenset(map(Right, scopes.split(","))) if scopes else Grant().rights
    except ValueError:
        rights = None
    if more or rights is None:
        raise ConfigError(
            f"{place}: expected a token, then scopes (some of {', '.join(Right)}, with commas and no blanks), then a "
            f"project; got {'more words' if more else 'other scopes'}"
        )
    if not is_name(project):
        raise ConfigError(f"{place}: expected as the project a name of {NAME_RULE}")
    return token, Grant(rights, project)
