"""`server`: settings of all ports of `agl serve`."""

import re
from ipaddress import ip_address
from typing import Annotated

from pydantic import AfterValidator, Field

from agl.config.section import Section


def _check_host(host: str) -> str:
    try:
        return host if re.fullmatch(r"[\w.-]+", host, re.ASCII) else str(ip_address(host))
    except ValueError:
        raise ValueError("expected a host name or an address, without scheme, port, brackets and wildcards") from None


class ServerConfig(Section):
    """Gateway, API and OTLP receivers together."""

    allowed_hosts: list[Annotated[str, AfterValidator(_check_host)]] = Field(default_factory=list)
    """Names and addresses, without ports, under which clients may address any port of `agl serve`, besides those of
    loopback and `--host`."""
