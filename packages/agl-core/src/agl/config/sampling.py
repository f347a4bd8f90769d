"""`sampling`: which production rollouts the store keeps."""

from pydantic import Field

from agl.config.section import Count, Fraction, Section


class TrafficSamplingConfig(Section):
    """Which rollouts of mode `prod` `agl serve` keeps. Without the section it keeps all."""

    base_rate: Fraction = 0.3
    """Probability with which a rollout is kept that nothing else keeps."""
    reward_threshold: float = 0.7
    """Rollouts with at least this reward are kept for certain."""
    max_span_per_minute: Count | None = 50
    """Limit on the spans of each service and minute that `base_rate` keeps; none: no limit."""
    decision_wait_s: float = Field(default=30.0, ge=0)
    """A rollout whose end nobody reports is decided so long after its last span."""
    grace_s: float = Field(default=2.0, ge=0)
    """How long the reward of a rollout may come after its end."""
    keep_failed: bool = True
    """Whether failed rollouts are kept for certain."""
