"""What the user asked for when switching the instrumentation on."""

from dataclasses import dataclass

from opentelemetry import baggage
from opentelemetry.context import Context
from opentelemetry.trace import Tracer

from agl import semconv
from agl.content import Content
from agl.role_map import RoleMap


class AgentRole(str):
    """A role that follows from an agent's name. The next agent to act takes the place of it, not of a stated one."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Settings:
    """The same for every span."""

    tracer: Tracer
    roles: RoleMap
    content: Content
    captures_token_ids: bool = False
    """Whether requests ask the server for token ids and logprobs."""

    def role_of(self, agent: str, context: Context | None = None) -> str:
        """The role that `agl.role` states, else the one that the agent is mapped to, else its name."""
        in_force = baggage.get_baggage(semconv.ROLE, context)
        if isinstance(in_force, str) and not isinstance(in_force, AgentRole):
            return in_force
        return AgentRole(self.roles.match(agent) or agent)
