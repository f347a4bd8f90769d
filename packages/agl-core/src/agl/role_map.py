"""Roles by agent name, for agents whose role is not their own name."""

import re
from collections.abc import Mapping
from functools import lru_cache

from agl.errors import ConfigError


class RoleMap:
    """Maps the name of a graph node, agent or chain to a role: `{"writer": "write_query|rewrite.*"}`.

    A pattern must match the whole name; the first matching role wins. Raises ConfigError for an invalid pattern.
    """

    def __init__(self, roles: Mapping[str, str] | None) -> None:
        self._patterns = [(role, _compile(role, pattern)) for role, pattern in (roles or {}).items()]
        self.match = lru_cache(maxsize=1024)(self._match)  # bounded: some frameworks generate new names for each run

    def _match(self, name: str) -> str | None:
        return next((role for role, pattern in self._patterns if pattern.fullmatch(name)), None)


def _compile(role: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"roles[{role!r}] is {pattern!r}, expected a regular expression: {error}") from error
