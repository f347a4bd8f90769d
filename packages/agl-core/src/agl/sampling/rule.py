"""The rule by which production rollouts are kept. It has no clock, no store and no chance: equal input, equal decision.

Consistent probability sampling as OpenTelemetry defines it: the randomness R of a unit is compared with a threshold T,
both numbers of 56 bits. A unit is kept if R >= T, so its probability is p = 1 - T / 2^56. Every process computes the
same R, and a later stage only raises T.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from agl.config import TrafficSamplingConfig
from agl.store.traffic import PROD
from agl.trajectory.sampled import SPACE, Decision, SamplingReason, randomness


@dataclass(frozen=True, slots=True)
class Unit:
    """What is decided at once: a group with all its rollouts, or a rollout without a group."""

    name: str
    """Id of the group or the rollout."""
    service: str
    minute: int
    """Minute in which it could be decided."""
    spans: int
    reward: float | None = None
    """The highest of its rollouts."""
    has_failed: bool = False
    """Whether one of its rollouts failed."""
    mode: str = PROD

    @property
    def randomness(self) -> int:
        return randomness(self.name)


def threshold_of(probability: float) -> int:
    return round((1 - probability) * SPACE)


def decide(unit: Unit, config: TrafficSamplingConfig) -> Decision | None:
    """The decision on `unit` alone; None if it passes the base rate, and its window decides."""
    if unit.mode != PROD:
        return Decision(unit.name, True, SamplingReason.MODE, 0)
    if unit.reward is not None and unit.reward >= config.reward_threshold:
        return Decision(unit.name, True, SamplingReason.REWARD, 0)
    if unit.has_failed and config.keep_failed:
        return Decision(unit.name, True, SamplingReason.FAILED, 0)
    base, limit = threshold_of(config.base_rate), config.max_span_per_minute
    if limit is not None and unit.spans > limit:
        return Decision(unit.name, False, SamplingReason.TOO_LONG, SPACE)
    if limit is None or unit.randomness < base:
        return Decision(unit.name, unit.randomness >= base, SamplingReason.BASE_RATE, base)
    return None


def window_threshold(units: Sequence[Unit], config: TrafficSamplingConfig) -> int:
    """Threshold of the units of one service and minute that passed the base rate.

    Units are taken by falling R while their spans are within the limit. The R of the first one that is not taken is the
    threshold of all (bottom-k sampling): it would be the same whatever larger R a taken unit had, so 1/p is unbiased.
    """
    spans, limit = 0, config.max_span_per_minute
    for unit in sorted(units, key=lambda unit: unit.randomness, reverse=True):
        spans += unit.spans
        if limit is not None and spans > limit:
            return unit.randomness + 1
    return threshold_of(config.base_rate)


def decide_in_window(unit: Unit, threshold: int) -> Decision:
    """The decision on a unit that passed the base rate, in a window with this threshold."""
    kept = unit.randomness >= threshold
    return Decision(unit.name, kept, SamplingReason.BASE_RATE if kept else SamplingReason.SPAN_LIMIT, threshold)
