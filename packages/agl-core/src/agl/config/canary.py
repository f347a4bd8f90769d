"""`canary`: how many production rollouts a candidate gets, and what promotes it or rolls it back."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from agl.config.section import Count, Fraction, Positive, Section

OpenFraction = Annotated[float, Field(gt=0, lt=1)]


class PromoteConfig(Section):
    """A promotion needs the rule on the days' ratios and the evidence of the e-process."""

    policy_improvement_ratio: float = 0.15
    """The rule: (candidate - current) / |current| of the mean rewards of a UTC day is greater than this"""
    days: Count = 3
    """on so many complete days running."""
    alpha: OpenFraction = 0.05
    """Limit on the probability that an equal candidate is ever promoted; likewise for each condition of a rollback."""
    min_rollouts: Count = 50
    """Rewarded rollouts of the candidate before it may be promoted; rollouts of the current version before latencies
    are compared."""


class GuardConfig(Section):
    """What rolls a candidate back besides its rewards."""

    errors: Fraction = 0.05
    """The candidate's share of failed rollouts exceeds the current version's by more than this."""
    p95_latency: Annotated[float, Field(ge=1)] = 1.5
    """The candidate's 95th percentile of latency exceeds the current version's more than so many times."""


class CanaryConfig(Section):
    """A canary gives a share of production rollouts to candidate versions (`agl canary start`)."""

    fraction: OpenFraction = 0.10
    """Share of users, or of rollouts without a user, that the candidate answers."""
    key: Literal["user", "rollout"] = "user"
    """What the arm is chosen by: `user`, else the rollout if the request names none; or always the rollout."""
    lowest_reward: float = 0.0
    """Least reward of a rollout. A reward outside of the range is an error."""
    highest_reward: float = 1.0
    """Greatest reward of a rollout."""
    promote: PromoteConfig = Field(default_factory=PromoteConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)
    auto: bool = False
    """Promote and roll back without being asked; else `agl canary status` says what it would do."""
    check_s: Positive = 600.0
    """Time between two evaluations of a running canary by `agl serve`."""

    @model_validator(mode="after")
    def _has_a_range(self) -> Self:
        if not self.lowest_reward < self.highest_reward:
            low, high = self.lowest_reward, self.highest_reward
            raise ValueError(f"highest_reward is {high:g}, expected more than lowest_reward, which is {low:g}")
        return self
