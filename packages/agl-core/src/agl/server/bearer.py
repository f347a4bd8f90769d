"""Bearer tokens: who may send to a server that others can reach."""

import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from agl.errors import ConfigError

TOKEN_VARIABLE: Final = "AGL_TOKEN"
"""Environment variable of the token, for servers and those who call them: other users cannot see it there."""

_SCHEME = b"bearer"


class Right(StrEnum):
    """What a token may do (its scope)."""

    AGENT = "agent"
    """Call models and send spans."""
    TRAINER = "trainer"
    """Everything."""
    READ = "read"
    """Look at what is there."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What the holder of a token may do, and for which project; a token of no project is for all."""

    rights: frozenset[Right] = frozenset({Right.TRAINER})
    project: str | None = None

    def allows(self, right: Right) -> bool:
        return right in self.rights or Right.TRAINER in self.rights


class BearerTokens:
    """The tokens that open a server, each with what it grants; with none it is open to everyone who reaches it."""

    def __init__(self, tokens: Iterable[str] | Mapping[str, Grant] = ()) -> None:
        grants = tokens if isinstance(tokens, Mapping) else dict.fromkeys(tokens, Grant())
        self._grants = {token.encode(): grant for token, grant in grants.items()}

    @classmethod
    def read(cls, token: str | None, path: Path | None) -> "BearerTokens":
        """`token`, which grants everything, and those of the file `path`: a line each of token, scopes and project.

        The scopes are some of `agent`, `trainer` and `read` with commas between; without any it is everything. Raises
        ConfigError where a token is empty or a line cannot be read.
        """
        if token is not None and not token.strip():
            raise ConfigError("the token is empty; pass the secret itself, or no token at all")
        return cls((_read_lines(path) if path else {}) | ({token.strip(): Grant()} if token else {}))

    def __bool__(self) -> bool:
        return bool(self._grants)

    def grant(self, authorization: bytes | None) -> Grant | None:
        """What this `Authorization` header grants, None if nothing; how long that takes tells nothing of the tokens."""
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
    """Whether only this machine reaches a server that listens on `host`."""
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
        raise ConfigError(f"{path} holds no token; write one a line, or take token_file out of the configuration")
    return grants


def _read_line(path: Path, number: int, line: str) -> tuple[str, Grant]:
    token, *rest = line.split()  # An error must not show the token.
    known = ", ".join(Right)
    if len(rest) > 2:
        raise ConfigError(
            f"{path}, line {number}: expected token, scopes ({known}) and project, got {len(rest)} words more"
        )
    try:
        rights = frozenset(map(Right, rest[0].split(","))) if rest else Grant().rights
    except ValueError as error:
        raise ConfigError(f"{path}, line {number}: the scopes are {rest[0]!r}, expected some of {known}") from error
    return token, Grant(rights, rest[1] if len(rest) == 2 else None)
