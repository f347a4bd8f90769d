"""Warnings about a reward, from the metrics of the steps so far: each says what was seen and what to do."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

Metrics = Mapping[str, float]

WINDOW: Final = 8
"""Steps that a trend needs."""
_FEW: Final = 3
"""Steps that show whether groups vary."""
_SURE: Final = 4.0
"""A slope counts if it is this many times its standard error: for 8 steps of noise, about 1 in 280 on one side."""
_SATURATED_SHARE: Final = 0.02
"""A part is saturated if its spread fell below this share of its largest."""
_PART, _STD = "reward/", "_std"


@dataclass(slots=True)
class RewardWatch:
    """Gives each warning of a training once; `steps` are the metrics of its steps."""

    steps: list[Metrics] = field(default_factory=list)
    _given: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, stored: Mapping[str, Sequence[tuple[int, float]]]) -> Self:
        """The watch of a training that resumes; `stored`: its metrics, as the store has them."""
        steps: dict[int, dict[str, float]] = {}
        for name, values in stored.items():
            for step, value in values:
                steps.setdefault(step, {})[name] = value
        return cls([steps[step] for step in sorted(steps) if "groups" in steps[step]])

    def add(self, metrics: Metrics) -> list[str]:
        """New warnings after a step with `metrics`."""
        self.steps.append(metrics)
        found = reward_warnings(self.steps)
        new = [text for name, text in found.items() if name not in self._given]
        self._given |= found.keys()
        return new


def reward_warnings(steps: Sequence[Metrics]) -> dict[str, str]:
    """Warnings of the last of `steps`, by a name for each."""
    found = _without_variance(steps[-_FEW:]) if len(steps) >= _FEW else {}
    window = steps[-WINDOW:]
    return found if len(window) < WINDOW else {**found, **_saturated(steps, window), **_hacked(window)}


def _without_variance(window: Sequence[Metrics]) -> dict[str, str]:
    """A binary reward most of whose groups earn alike."""
    groups = sum(step.get("groups", 0.0) for step in window)
    alike = sum(step.get("groups/zero_variance", 0.0) for step in window)
    if not all(_is_binary(step) for step in window) or 2 * alike <= groups:
        return {}
    mean = statistics.fmean(step["reward/mean"] for step in window)
    advice = "easier" if mean < 0.5 else "harder"
    return {
        "variance": f"the reward is 0 or 1, and in {alike:.0f} of {groups:.0f} groups all rollouts earned the same "
        f"(mean {mean:.2f}), so they train nothing: take {advice} tasks, a larger train.group_size, or a reward with "
        "parts"
    }


def _is_binary(step: Metrics) -> bool:
    """Whether mean and variance of the rewards are those of values 0 and 1 only: var = mean (1 - mean)."""
    mean, deviation = step.get("reward/mean"), step.get("reward/std")
    if mean is None or deviation is None or not 0 <= mean <= 1:
        return False
    return math.isclose(deviation**2, mean * (1 - mean), abs_tol=1e-9)


def _saturated(steps: Sequence[Metrics], window: Sequence[Metrics]) -> dict[str, str]:
    """A part that varied, and does no more while the reward still does."""
    if not all(step.get("reward/std", 0.0) > 0 for step in window):
        return {}
    found = {}
    for part in _parts(window):
        largest = max(step.get(f"{_PART}{part}{_STD}", 0.0) for step in steps)
        now = max(step[f"{_PART}{part}{_STD}"] for step in window)
        if largest > 0 and now <= _SATURATED_SHARE * largest:
            mean = statistics.fmean(step[_PART + part] for step in window)
            found[f"saturated {part}"] = (
                f"part {part} of the reward is saturated: it is {mean:.3g} in nearly all rollouts of the last {WINDOW} "
                "steps, so it adds a constant and trains nothing; give it a lower weight, or make it harder to earn"
            )
    return found


def _hacked(window: Sequence[Metrics]) -> dict[str, str]:
    """Parts that fall while the reward rises; not if either does not clearly do so."""
    total = [step.get("reward/mean", math.nan) for step in window]
    if any(map(math.isnan, total)) or _slope(total) < _SURE:
        return {}
    return {
        f"hacking {part}": f"the reward rises ({total[0]:.3g} to {total[-1]:.3g} in {WINDOW} steps) while its part "
        f"{part} falls ({window[0][_PART + part]:.3g} to {window[-1][_PART + part]:.3g}): perhaps reward hacking, in "
        "which the policy earns other parts at its cost. Read rollouts of the last step; let a Gate ask for it, or "
        "weigh it more"
        for part in _parts(window)
        if _slope([step[_PART + part] for step in window]) <= -_SURE
    }


def _parts(window: Sequence[Metrics]) -> list[str]:
    """Parts that every step of the window has."""
    names = set.intersection(*(set(step) for step in window))
    own = {name.removeprefix(_PART) for name in names if name.startswith(_PART)} - {"mean", "std"}
    return sorted(part for part in own if f"{_PART}{part}{_STD}" in names)


def _slope(values: Sequence[float]) -> float:
    """Slope of the least-squares line through `values`, in units of its standard error; 0 for values that are equal."""
    line = statistics.linear_regression(range(len(values)), values)
    left = sum((value - line.intercept - line.slope * x) ** 2 for x, value in enumerate(values))
    spread = sum((x - (len(values) - 1) / 2) ** 2 for x in range(len(values)))
    error = math.sqrt(left / (len(values) - 2) / spread)
    if error < 1e-12 * max(map(abs, values)) + 1e-300:  # a straight line, but for rounding
        return 0.0 if max(values) == min(values) else math.copysign(math.inf, line.slope)
    return line.slope / error
