"""`judge`: a language model that ranks rollouts."""

from typing import Annotated

from pydantic import Field

from agl.config.section import Count, Positive, Section


class JudgeConfig(Section):
    """A language model that ranks the rollouts of each group, as a reward (`agl train`)."""

    url: Annotated[str, Field(pattern=r"^https?://")]
    """Base URL of an OpenAI-compatible server (ending in `/v1`)."""
    model: str
    """Its model."""
    key_env: str | None = None
    """Environment variable of its key."""
    criteria: str
    """What makes one rollout better than another, in words."""
    roles: list[str] = Field(default_factory=list)
    """Roles whose parts are ranked each by themselves; none: rollouts as a whole."""
    rankings: Count = 2
    """Rankings of each group, in orders of their own."""
    max_chars: Count = 8000
    """Longest text of a rollout, and of the task, that it is shown."""
    timeout_s: Positive = 120.0
    """For each of its answers."""
