"""What the user asked for when switching the instrumentation on."""

from dataclasses import dataclass

from opentelemetry.trace import Tracer

from agl.content.filter import ContentFilter
from agl.role_map import RoleMap


@dataclass(frozen=True, slots=True)
class Settings:
    """The same for every span."""

    tracer: Tracer
    roles: RoleMap
    content: ContentFilter
    captures_token_ids: bool = False
    """Whether requests ask the server for token ids and logprobs."""

    def role_of(self, agent: str) -> str:
        """The role that the agent is mapped to, else its name."""
        return self.roles.match(agent) or agent
