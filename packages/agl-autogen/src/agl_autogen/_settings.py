"""Settings of the instrumentation, from the arguments of `instrument`."""

from dataclasses import dataclass

from opentelemetry.trace import Tracer

from agl.content.filter import ContentFilter
from agl.role_map import RoleMap


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings that apply to every span."""

    tracer: Tracer
    roles: RoleMap
    content: ContentFilter
    records_message_bus: bool = False
    """Whether AutoGen's spans of each message are recorded."""
    captures_token_ids: bool = False
    """Whether requests ask the server for token ids and logprobs."""

    def role_of(self, agent: str) -> str:
        """The role that `roles` maps the agent's name to, else the name."""
        return self.roles.match(agent) or agent
