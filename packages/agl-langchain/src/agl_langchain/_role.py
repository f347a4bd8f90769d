"""The role of the agent that makes a call, from LangChain's and LangGraph's names, tags and metadata."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from agl.role_map import RoleMap

ROLE_METADATA = "agl_role"
"""Key of LangChain metadata that sets the role: `config={"metadata": {"agl_role": "planner"}}`."""
ROLE_TAG = "role:"
"""Prefix of a LangChain tag that sets the role: `config={"tags": ["role:planner"]}`."""

_NODE_TAG = "graph:step:"
"""Prefix of the tag that LangGraph gives to the run of a node, and to no run inside it."""


class Actor(NamedTuple):
    """The agent that acts in a run, by its names. Child runs inherit it."""

    agent: str | None = None
    """Name of the nearest agent or graph node."""
    mapped_role: str | None = None
    """Role of the nearest name that the handler's `roles` match."""
    has_steps: bool = False
    """Whether the run is the graph of one agent (`create_agent`), whose nodes are that agent's steps, not agents."""

    @classmethod
    def of_chain(
        cls, name: str, tags: Sequence[str], metadata: Mapping[str, Any], above: "Actor | None", roles: RoleMap
    ) -> tuple["Actor", bool]:
        """The actor of the chain, graph or node `name` below `above`, and whether the run is that agent itself."""
        outer = above or cls.of_metadata(metadata, roles)
        is_node = any(tag.startswith(_NODE_TAG) for tag in tags)
        is_agent = metadata.get("lc_agent_name") == name
        is_prebuilt = metadata.get("ls_integration") == "langchain_create_agent"
        starts_here = is_agent or (is_node and not (outer.has_steps and outer.agent))
        has_steps = is_agent or (is_prebuilt and not is_node)
        agent = name if starts_here else outer.agent
        return cls(agent, roles.match(name) or outer.mapped_role, has_steps), starts_here

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, Any], roles: RoleMap) -> "Actor":
        """The actor that LangGraph's metadata names, for a run whose parent is unknown."""
        node, agent = metadata.get("langgraph_node"), metadata.get("lc_agent_name")
        mapped = [role for name in (node, agent) if name and (role := roles.match(name))]
        return cls(agent=agent or node, mapped_role=mapped[0] if mapped else None)


def marked_role(tags: Sequence[str], metadata: Mapping[str, Any]) -> str | None:
    """The role set by metadata or a tag. The last tag wins, because LangChain puts the innermost tags last."""
    role = metadata.get(ROLE_METADATA)
    if isinstance(role, str) and role:
        return role
    roles = [tag.removeprefix(ROLE_TAG) for tag in tags if tag.startswith(ROLE_TAG) and tag != ROLE_TAG]
    return roles[-1] if roles else None
