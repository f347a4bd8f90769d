"""What the user asked for when switching the instrumentation on."""

from dataclasses import dataclass

from opentelemetry.trace import Tracer

from agl.role_map import RoleMap


@dataclass(frozen=True, slots=True)
class Settings:
    """The same for every span."""

    tracer: Tracer
    roles: RoleMap
    captures_content: bool
    """Whether messages and tool definitions go on the spans."""

    def role_of(self, agent: str) -> str:
        """The role that an agent is mapped to, else its name."""
        return self.roles.match(agent) or agent
