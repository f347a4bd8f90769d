"""A server with an OpenAI-compatible API that the configuration names: an engine, or the judge."""

import os
from base64 import b64encode
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, model_validator

from agl.config.section import Section
from agl.errors import ConfigError
from agl.secret_url import SecretUrl


def _check_base_url(url: SecretUrl) -> SecretUrl:
    try:
        parts = urlsplit(url.secret)
        has_end = bool(parts.query or parts.fragment)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not has_end:
            return url
    except ValueError:  # Its text may quote the password.
        pass
    raise ValueError("expected a base URL, http://HOST:PORT/v1 or https://HOST/v1, with nothing after the path")


class EndpointConfig(Section):
    """Where a server is, and what it wants to see before it answers."""

    url: Annotated[SecretUrl, AfterValidator(_check_base_url)]
    """Base URL of an OpenAI-compatible server (ending in `/v1`); `user:password@` is sent as Basic authentication."""
    key_env: str | None = None
    """Environment variable of the server's API key. It replaces the key that a client sends."""

    @model_validator(mode="after")
    def _has_one_credential(self) -> Self:
        if self.key_env and self.url.login:
            raise ValueError("url has a user or password and key_env names a key, but one header must hold both")
        return self

    @property
    def base_url(self) -> str:
        """The URL that requests go to; it has no user, no password and no slash at the end."""
        return self.url.without_login.rstrip("/")

    def authorization(self) -> dict[str, str]:
        """The header that holds key or password, if any. Raises ConfigError if the environment has no such key."""
        if self.key_env and not os.environ.get(self.key_env, "").strip():
            raise ConfigError(f"the environment has no {self.key_env}, which key_env of {self.url} names")
        if self.key_env:
            return {"authorization": f"Bearer {os.environ[self.key_env].strip()}"}
        if self.url.login:
            return {"authorization": "Basic " + b64encode(":".join(self.url.login).encode()).decode()}
        return {}
