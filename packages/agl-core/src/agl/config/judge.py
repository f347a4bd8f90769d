"""`judge`: a language model whose ranking of rollouts is a reward."""

from pydantic import Field

from agl.config.endpoint import EndpointConfig
from agl.config.section import Count, Positive


class JudgeConfig(EndpointConfig):
    """A language model that ranks the rollouts of each group; the rank is a reward (`agl train`)."""

    model: str
    """`model` of the requests."""
    criteria: str
    """The criteria in words: the properties of a good rollout."""
    roles: list[str] = Field(default_factory=list)
    """Roles to rank separately, each by its part of the rollouts; empty: rank whole rollouts."""
    rankings: Count = 2
    """Number of rankings of each group, each with the rollouts in a different order."""
    max_chars: Count = 8000
    """Longest text of a rollout, and of the task, in its prompt; in characters."""
    timeout_s: Positive = 120.0
    """Limit for each of its responses."""
