"""The role of the agent that makes a call, from LangChain's and LangGraph's names, tags and metadata."""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any, NamedTuple

from agl.patches import Patches
from agl.role_map import RoleMap, agent_in_metadata, is_step

ROLE_METADATA = "agl_role"
"""Key of LangChain metadata that sets the role: `config={"metadata": {"agl_role": "planner"}}`."""
ROLE_TAG = "role:"
"""Prefix of a LangChain tag that sets the role: `config={"tags": ["role:planner"]}`."""

_NODE_TAG = "graph:step:"
"""Prefix of the tag that LangGraph gives to the run of a node, whose parent run therefore is a graph."""

_GRAPH: ContextVar[str | None] = ContextVar("agl_langchain_graph", default=None)
"""Name of the graph whose run starts next. A run that is no graph may take it, where it has no effect."""


class Actor(NamedTuple):
    """The agent that acts in a run, by its names. Child runs inherit it."""

    agent: str | None = None
    """Name of the nearest agent, graph node or task."""
    mapped_role: str | None = None
    """Role of the nearest name that the handler's `roles` match."""
    namespace: object = None
    """LangGraph's namespace of the run, which a graph and all runs in one of its nodes inherit."""
    created_agent: object = None
    """Name that `create_agent` gave to the nearest of its agents: LangGraph lets all runs below inherit it."""
    chain: str | None = None
    """Name of the run unless it is a node: if the run turns out to be a graph, the name of that graph."""
    is_in_tool: bool = False
    """Whether the run is a tool or inside one: a graph that starts there is not the agent that called the tool."""

    @property
    def is_node(self) -> bool:
        """Whether the run is that of a node or task."""
        return self.chain is None

    def in_tool(self) -> "Actor":
        """The actor of a tool that this one calls."""  # not by `_replace`, which takes three times as long
        return Actor(self.agent, self.mapped_role, self.namespace, self.created_agent, None, True)

    @classmethod
    def of_chain(
        cls, name: str, tags: Sequence[str], metadata: Mapping[str, Any], above: "Actor | None", roles: RoleMap
    ) -> "Actor":
        """The actor of the chain, graph, node or task `name` below `above`.

        Only the start of a node reveals that its parent is a graph. A graph whose nodes are steps ("model", "tools") is
        an agent. It acts under its own name, else under that of the node that it is in.
        """
        outer = above or cls.of_metadata(metadata, roles)
        namespace, created = metadata.get("langgraph_checkpoint_ns"), metadata.get("lc_agent_name")
        mapped = roles.match(name)
        if name != metadata.get("langgraph_node") or namespace == outer.namespace:  # else the first run of a node
            chain = _GRAPH.get() or name
            _GRAPH.set(None)
            if isinstance(created, str) and created != outer.created_agent:
                chain = created
            return cls(outer.agent, mapped or outer.mapped_role, namespace, created, chain, outer.is_in_tool)
        graph = outer.chain if any(tag.startswith(_NODE_TAG) for tag in tags) else None
        if graph and outer.is_in_tool:
            outer = cls(mapped_role=roles.match(graph))
        agent = name if not is_step(name) else graph if graph and not is_step(graph) else outer.agent
        return cls(agent, mapped or outer.mapped_role, namespace, created)

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, Any], roles: RoleMap) -> "Actor":
        """The actor that LangGraph's metadata names, for a run whose parent is unknown."""
        agent = agent_in_metadata(metadata)
        names = (metadata.get("langgraph_node"), agent)
        return cls(agent, next((role for name in names if name and (role := roles.match(name))), None))


def marked_role(tags: Sequence[str], metadata: Mapping[str, Any]) -> str | None:
    """The role set by metadata or a tag. The last tag wins, because LangChain puts the innermost tags last."""
    role = metadata.get(ROLE_METADATA)
    if isinstance(role, str) and role:
        return role
    roles = [tag.removeprefix(ROLE_TAG) for tag in tags if tag.startswith(ROLE_TAG) and tag != ROLE_TAG]
    return roles[-1] if roles else None


def patch_graph_names(patches: Patches) -> None:
    """Make the names of graphs known: a run has the graph's name only if the config has no `run_name` of its own.

    LangGraph calls `get_name` right before it starts a run. No effect without `langgraph`.
    """
    if find_spec("langgraph") is not None:
        from langgraph.pregel import Pregel

        patches.replace(Pregel, "get_name", _noting_the_name)
        patches.on_restore(_GRAPH.set, None)


def _noting_the_name(original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def get_name(graph: Any, *args: Any, **kwargs: Any) -> str:
        _GRAPH.set(graph.name)
        return original(graph, *args, **kwargs)

    return get_name
