"""Bearer tokens: who may send to a server that others can reach."""

import hmac
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from agl.errors import ConfigError

TOKEN_VARIABLE: Final = "AGL_TOKEN"
"""Environment variable of the token, for servers and those who call them: other users cannot see it there."""

_SCHEME = b"bearer"


class BearerTokens:
    """The tokens that open a server; with none it is open to everyone who reaches it."""

    def __init__(self, tokens: Iterable[str] = ()) -> None:
        self._tokens = tuple(token.encode() for token in tokens)

    @classmethod
    def read(cls, token: str | None, path: Path | None) -> "BearerTokens":
        """`token`, and those of the file `path`, one a line. Raises ConfigError where one is empty or unreadable."""
        if token is not None and not token.strip():
            raise ConfigError("the token is empty; pass the secret itself, or no token at all")
        return cls([*([token.strip()] if token else []), *(_read_lines(path) if path else [])])

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def admit(self, authorization: bytes | None) -> bool:
        """Whether this `Authorization` header opens the server; how long that takes tells nothing of the tokens."""
        if not self._tokens:
            return True
        scheme, _, given = (authorization or b"").partition(b" ")
        matches = [hmac.compare_digest(given.strip(), token) for token in self._tokens]
        return any(matches) and scheme.lower() == _SCHEME


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_lines(path: Path) -> list[str]:
    try:
        tokens = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the tokens in {path}: {error}") from error
    if not tokens:
        raise ConfigError(f"{path} holds no token; write one a line, or take token_file out of the configuration")
    return tokens
