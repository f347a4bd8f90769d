"""`server`: settings of all ports of `agl serve`."""

from pydantic import Field

from agl.config.section import Section


class ServerConfig(Section):
    """Gateway, API and OTLP receivers together."""

    allowed_hosts: list[str] = Field(default_factory=list)
    """Host names and addresses under which clients may address the server, besides those of loopback and `--host`."""
