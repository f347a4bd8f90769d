"""The URI of a Cassandra store: `cassandra://[user:password@]host[:port][,host...]/keyspace[?option=value&...]`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Self
from urllib.parse import parse_qsl, urlsplit

from agl.errors import StoreError
from agl.secret_url import SecretUrl
from agl.store.project import database_name, split_project

OPTIONS: Final = ("port", "replication_factor", "datacenter", "protocol_version")
_PORT: Final = 9042
_KEYSPACE: Final = re.compile(r"[A-Za-z]\w{0,47}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed URI; `name` shows it. None: the default of the cluster, or up to three copies."""

    name: SecretUrl
    hosts: tuple[str, ...]
    port: int
    keyspace: str
    user: str
    password: str = field(repr=False)
    replication_factor: int | None
    datacenter: str | None
    protocol_version: int | None

    @classmethod
    def of(cls, uri: str) -> Self:
        """Parse `uri`. Raises StoreError, without the password, if it is invalid."""
        name = SecretUrl(uri)
        base, project = split_project(name)
        parts, (user, password) = urlsplit(base.without_login), name.login or ("", "")
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise StoreError(f"{name} has the option {unknown[0]!r}; known are {', '.join(OPTIONS)}")
        names, port = _hosts(name, parts.netloc, _number(name, options, "port") or _PORT)
        keyspace = database_name(parts.path.removeprefix("/"), project)
        if not _KEYSPACE.fullmatch(keyspace):
            raise StoreError(f"{name} names the keyspace {keyspace!r}; expected cassandra://h1,h2,h3/keyspace")
        copies, version = (_number(name, options, option) for option in ("replication_factor", "protocol_version"))
        datacenter = options.get("datacenter")
        return cls(name, names, port, keyspace, user, password, copies, datacenter, version)


def _hosts(name: str, text: str, port: int) -> tuple[tuple[str, ...], int]:
    """The hosts and their port, the same for all: nodes report each other to clients without a port."""
    pairs = [host.partition(":") for host in text.split(",")]
    ports = {found for _, _, found in pairs if found} or {str(port)}
    if not all(host for host, _, _ in pairs) or len(ports) > 1 or not all(map(str.isdecimal, ports)):
        raise StoreError(f"{name} names the nodes {text!r}; expected h1,h2,h3, and one port for all as ?port=9042")
    return tuple(host for host, _, _ in pairs), int(ports.pop())


def _number(name: str, options: Mapping[str, str], option: str) -> int | None:
    text = options.get(option)
    if text is not None and not (text.isdecimal() and int(text) > 0):
        raise StoreError(f"{name} has the {option} {text!r}, expected a number from 1")
    return None if text is None else int(text)
