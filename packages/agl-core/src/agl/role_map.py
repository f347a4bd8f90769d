"""Roles by agent name: a map for agents whose role is not their own name, and the names that name no agent."""

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Final

import regex

from agl.errors import ConfigError

logger = logging.getLogger("agl")

_MATCH_S: Final = 0.2
"""Limit for one match, in CPU time: the time that some patterns need doubles with each character of a name."""

# fmt: off
_STEPS = {
    "LangGraph", "__start__", "agent", "model", "tools", "call_model", "call_tool", "call_llm", "llm_call", "llm",
    "tool_node", "call_agent", "model_request", "should_continue", "pre_model_hook", "post_model_hook",
    "generate_structured_response",
}
# fmt: on
_HOOKS = frozenset({"before_agent", "before_model", "after_model", "after_agent"})
"""Nodes of middleware: `<middleware>.before_model`."""


class RoleMap:
    """Maps the name of a graph node, agent or chain to a role: `{"writer": "write_query|rewrite.*"}`.

    A pattern must match the whole name; the first matching role wins. A pattern that takes too long on a name does not
    match it, which is logged. Raises ConfigError for an invalid pattern.
    """

    def __init__(self, roles: Mapping[str, str] | None) -> None:
        self._patterns = [(role, _compile(role, pattern)) for role, pattern in (roles or {}).items()]
        self.match = lru_cache(maxsize=1024)(self._match)  # bounded: some frameworks generate new names for each run

    def _match(self, name: str) -> str | None:
        return next((role for role, pattern in self._patterns if _matches(role, pattern, name)), None)


def _matches(role: str, pattern: regex.Pattern[str], name: str) -> bool:
    try:
        return pattern.fullmatch(name, timeout=_MATCH_S) is not None
    except TimeoutError:
        logger.warning(
            "roles[%r] is %r, which needs more than %g s for the name %.80r, so the name does not match it; write the "
            "pattern without a repetition inside a repetition",
            role,
            pattern.pattern,
            _MATCH_S,
            name,
        )
        return False


def _compile(role: str, pattern: str) -> regex.Pattern[str]:
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ConfigError(f"roles[{role!r}] is {pattern!r}, expected a regular expression: {error}") from error


@lru_cache(maxsize=1024)
def is_step(name: str) -> bool:
    """Whether `name` is that of an unnamed graph, or of a node that is a step of an agent: it is never a role."""
    middleware, _, hook = name.rpartition(".")
    return name in _STEPS or bool(middleware and hook in _HOOKS)


def agent_in_metadata(metadata: Mapping[str, object]) -> str | None:
    """The agent of a run, from LangGraph's metadata alone. None if it does not name one.

    The run's namespace is the path of its nodes: `author:<id>|tools:<id>|model:<id>`. A graph in a tool is an agent of
    its own, for which the caller's names, which LangGraph lets it inherit, do not count.
    """
    namespace = metadata.get("langgraph_checkpoint_ns") or metadata.get("langgraph_node")
    path = [part.partition(":")[0] for part in namespace.split("|")] if isinstance(namespace, str) else [""]
    if path[-1] and not is_step(path[-1]):
        return path[-1]
    named = metadata.get("lc_agent_name")
    caller = [depth for depth, name in enumerate(path[:-1]) if name == "tools"]
    if isinstance(named, str) and named and not caller:
        return named
    own = path[caller[-1] + 1 :] if caller else path
    return next((name for name in reversed(own) if name and not is_step(name)), None)
