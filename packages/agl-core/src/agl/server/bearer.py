"""Bearer tokens of a server, and the rights and the project that each of them grants."""

import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from agl.errors import ConfigError

TOKEN_VARIABLE: Final = "AGL_TOKEN"
"""Environment variable of the token, for servers and clients; unlike an argument, other users cannot see it."""

_SCHEME = b"bearer"


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
