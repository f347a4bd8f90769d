"""The rollouts of a canary by UTC day and arm, and the plain rule on the days' means."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

_Z: float = 1.96
"""Half a 95 % interval of a mean, in standard errors."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A production rollout, as far as the canary counts it."""

    rollout_id: str
    key: str
    """What its arm was chosen by, as a hash."""
    is_candidate: bool
    fraction: float
    """The candidate's share of rollouts when it began."""
    day: str
    """UTC date on which it began."""
    ended_ns: int
    latency_s: float
    failed: bool
    reward: float | None = None
    """Scaled to [0, 1]; None if it has none yet."""
    rewarded_ns: int = 0


@dataclass(frozen=True, slots=True)
class ArmDay:
    """One arm on one day. Means and quantiles are None if nothing was measured."""

    rollouts: int
    rewards: int
    errors: int
    mean: float | None
    """Of the rewards, in the user's scale."""
    interval: float | None
    """Half of its 95 % interval; None for fewer than two rewards."""
    p50_s: float | None
    p95_s: float | None


@dataclass(frozen=True, slots=True)
class Day:
    date: str
    current: ArmDay
    candidate: ArmDay
    ratio: float | None
    """`policy_improvement_ratio`; None if an arm has no reward, or the current version's mean is 0."""


def by_day(samples: Iterable[Sample], reward_range: tuple[float, float]) -> list[Day]:
    """A row for each date that has a rollout."""
    days: dict[str, tuple[list[Sample], list[Sample]]] = {}
    for sample in samples:
        days.setdefault(sample.day, ([], []))[sample.is_candidate].append(sample)
    found = []
    for date in sorted(days):
        current, candidate = (_arm_day(arm, reward_range) for arm in days[date])
        found.append(Day(date, current, candidate, improvement_ratio(current.mean, candidate.mean)))
    return found


def improvement_ratio(current: float | None, candidate: float | None) -> float | None:
    """(candidate - current) / |current|; None if a mean is missing or `current` is 0."""
    return None if not current or candidate is None else (candidate - current) / abs(current)


def days_running(ratios: Sequence[float | None], above: float) -> int:
    """On how many of the last days in a row the ratio was greater than `above`."""
    running = 0
    for ratio in ratios:
        running = running + 1 if ratio is not None and ratio > above else 0
    return running


def quantile(values: Collection[float], share: float) -> float | None:
    """The smallest value that at least `share` of the values do not exceed; None for no values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def _arm_day(samples: Sequence[Sample], reward_range: tuple[float, float]) -> ArmDay:
    low, high = reward_range
    rewards = [low + sample.reward * (high - low) for sample in samples if sample.reward is not None]
    latencies = [sample.latency_s for sample in samples]
    return ArmDay(
        rollouts=len(samples),
        rewards=len(rewards),
        errors=sum(sample.failed for sample in samples),
        mean=fmean(rewards) if rewards else None,
        interval=_Z * stdev(rewards) / math.sqrt(len(rewards)) if len(rewards) > 1 else None,
        p50_s=quantile(latencies, 0.5),
        p95_s=quantile(latencies, 0.95),
    )
