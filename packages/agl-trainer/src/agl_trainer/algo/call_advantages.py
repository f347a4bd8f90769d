"""Advantages of single calls: what a rollout's advantage becomes when calls in it earned different rewards.

    A_c = A_r * d_c / mean(d)  +  (e_c - mean(e)) / (sqrt(std^2 + within^2) + 1e-4)

A_r is the advantage of the role in rollout r, d_c the discount of the reward that call c shares, e_c the reward of the
call itself; means are over the role's calls in r. std is the standard deviation that divides A_r, within that of
e_c - mean(e) over the same rollouts; if A_r was not divided, the divisor is 1. So calls of a rollout differ by their
discounts and their own rewards, while rollouts differ by their credit as a whole. For a single call A_c is A_r.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from agl_trainer.algo.advantages import EPSILON, AdvantageEstimate
from agl_trainer.algo.credit import Credit


@dataclass(frozen=True, slots=True)
class CallMeans:
    """Means over the rewarded calls of a role in one rollout."""

    own: float
    discount: float

    @classmethod
    def of(cls, credits: Sequence[Credit]) -> Self:
        own = sum(credit.own for credit in credits) / len(credits)
        return cls(own, sum(credit.discount for credit in credits) / len(credits))

    def advantage(self, credit: Credit, rollout_advantage: float, scale: float) -> float:
        """A_c of the call that earned `credit`; `scale` divides the rewards of single calls."""
        share = credit.discount / self.discount if self.discount else 1.0
        return rollout_advantage * share + (credit.own - self.own) / scale


def call_scales(credits: Sequence[Sequence[Credit]], found: AdvantageEstimate) -> list[float]:
    """Divisor of the rewards of single calls, for each rollout; `credits` are those of its calls, `found` has A_r."""
    if found.deviations is None:
        return [1.0] * len(credits)
    own = [[credit.own for credit in of_rollout] for of_rollout in credits]
    within = [sum((value - sum(values) / len(values)) ** 2 for value in values) / len(values) for values in own]
    scales = [0.0] * len(credits)
    for indices in map(Tensor.tolist, found.scaled_together):
        variance = sum(within[index] for index in indices) / len(indices)
        for index in indices:
            scales[index] = math.sqrt(float(found.deviations[index]) ** 2 + variance) + EPSILON
    return scales
