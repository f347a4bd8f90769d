"""A URL that may hold a password, a token or a key, and whose text does not show it."""

import re
from typing import Any, Self
from urllib.parse import unquote

from agl.errors import ConfigError

_SCHEME = r"(?:[a-z][a-z\d+.-]*://)?"
_URL = re.compile(rf"({_SCHEME})(?:([^@/?#]*)@)?([^@?#]*)(?:[?#]([^@]*))?", re.IGNORECASE)
_FILES = ("sqlite:", "memory:")
"""Schemes of URLs that name a file, or nothing, and no server."""
_PROJECT = re.compile(r"project=[\w.-]{1,64}", re.ASCII)
"""The option of a store's URL that is shown: it is no secret, and tells stores apart."""
_SECRET_OPTION = re.compile(r"[^&=]*(?:pass|pwd|token|key|secret|auth|sig)[^&=]*=([^&]*)", re.IGNORECASE)


class SecretUrl(str):
    """As a string, the URL with `***` for its user, password, query and fragment; `secret` is the whole URL.

    So what prints, joins, logs, encodes or compares the string cannot show the secret, and only the place that connects
    asks for it. The path is shown. Raises ConfigError, without the secret, if an `@` makes it ambiguous where the
    password ends.
    """

    secret: str

    def __new__(cls, url: str) -> Self:
        if isinstance(url, cls):
            return url
        made = super().__new__(cls, _shown(url))
        made.secret = url
        return made

    @staticmethod
    def shown(text: str) -> str:
        """`text`, which may be a wrong URL, as it may be shown."""
        try:
            return str(SecretUrl(text))
        except ConfigError:
            return "***"

    @property
    def login(self) -> tuple[str, str] | None:
        """User and password, decoded; None without either."""
        found = _split(self.secret)[1]
        user, _, password = (found or "").partition(":")
        return (unquote(user), unquote(password)) if found else None

    @property
    def without_login(self) -> str:
        """The URL without user and password, for what sends these in its own way."""
        scheme, login, _, _ = _split(self.secret)
        return self.secret if login is None else scheme + self.secret[len(scheme) + len(login) + 1 :]

    def hide(self, text: str) -> str:
        """`text`, e.g. an error of a driver that quotes this URL, with `***` for the URL and its secret parts."""
        _, login, _, options = _split(self.secret)
        user, _, password = (login or "").partition(":")
        parts = {self.secret, login or "", password or user, *_SECRET_OPTION.findall(options or "")}
        for part in sorted({*parts, *map(unquote, parts)} - {""}, key=len, reverse=True):
            text = text.replace(part, "***")
        return text

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema  # A process that only sends spans does not need pydantic.

        return core_schema.no_info_plain_validator_function(
            cls._validated, serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def _validated(cls, value: Any) -> Self:
        if not isinstance(value, str):
            raise ValueError("expected a URL as text")
        try:
            return cls(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error


def _shown(url: str) -> str:
    if url.startswith(_FILES):
        return url
    scheme, login, place, options = _split(url)
    return scheme + ("" if login is None else "***@") + place + _shown_options(options or "")


def _shown_options(options: str) -> str:
    parts = dict.fromkeys(part if _PROJECT.fullmatch(part) else "***" for part in options.split("&"))
    return "?" + "&".join(parts) if options else ""


def _split(url: str) -> tuple[str, str | None, str, str | None]:
    """Scheme, user and password, host with path, and query or fragment. Raises ConfigError if an `@` is elsewhere."""
    parts = _URL.fullmatch(url)
    if parts is None:
        scheme = re.match(_SCHEME, url, re.IGNORECASE)
        raise ConfigError(
            f"{scheme[0] if scheme else ''}***: expected no @ in a URL except the one before the host; in a user or "
            "password write @ as %40, / as %2F, ? as %3F and # as %23"
        )
    return parts[1], parts[2], parts[3], parts[4]
