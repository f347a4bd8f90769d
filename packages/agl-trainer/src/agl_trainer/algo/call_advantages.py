"""Advantages of single calls: what a rollout's advantage becomes when calls in it earned different rewards.

    A_c = A_r * d_c / mean(d)  +  (e_c - mean(e)) / (sqrt(std^2 + within^2) + 1e-4)

A_r is the advantage of the role in rollout r, d_c the discount of the reward that call c shares, e_c the reward of the
call itself; means are over the role's calls in r. std is the standard deviation that divides A_r, within that of
e_c - mean(e) over the same rollouts; if A_r was not divided, the divisor is 1. So calls of a rollout differ by their
discounts and their own rewards, while rollouts differ by their credit as a whole. For a single call A_c is A_r.

For advantage gdpo, A_c is computed with advantage grpo for each reward dimension; see `gdpo_call_advantages`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from agl.config import LossConfig
from agl_trainer.algo.advantages import EPSILON, AdvantageEstimate, Population, estimate_advantages
from agl_trainer.algo.credit import Credit, role_credit, undiscounted_credit

_ROUNDING = 1e-8
"""Differences below this, times the largest credit of the group, are rounding errors of equal rewards."""
CallCredits = Mapping[str, Credit]
"""Span id of a call that a reward reaches to its credit."""


@dataclass(frozen=True, slots=True)
class CallAdvantage:
    """Advantage of a call."""

    value: float
    trains: bool
    """It is more than a rounding error."""
    differs: bool
    """The call earned something else than its group, whatever the advantage divides or subtracts."""


@dataclass(slots=True)
class RolloutAdvantage:
    """Advantage of a role in a rollout, and of its calls by span id."""

    value: float = 0.0
    undiscounted: float = 0.0
    """The value if no reward were discounted."""
    calls: dict[str, CallAdvantage] = field(default_factory=dict)


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
    if found.deviations is None or found.scaled_together is None:
        return [1.0] * len(credits)
    own = [[credit.own for credit in of_rollout] for of_rollout in credits]
    within = [sum((value - sum(values) / len(values)) ** 2 for value in values) / len(values) for values in own]
    variances = found.scaled_together.means(torch.tensor(within, dtype=torch.float64))
    return ((found.deviations**2 + variances).sqrt() + EPSILON).tolist()


def call_advantages(
    credits: Sequence[CallCredits],
    group_ids: Sequence[str],
    loss: LossConfig,
    represented: Tensor,
    baseline: float = 0.0,
) -> list[RolloutAdvantage]:
    """Advantages of rollouts, none of which is without a credit, and of their calls. `baseline`: of advantage ema.

    `represented` [R]: see `Population`.
    """
    rewarded = [list(of_rollout.values()) for of_rollout in credits]
    values = torch.tensor([role_credit(of_rollout) for of_rollout in rewarded], dtype=torch.float64)
    earned = torch.tensor([undiscounted_credit(of_rollout) for of_rollout in rewarded], dtype=torch.float64)
    options = {
        "scale_rewards": loss.scale_rewards,
        "k": loss.max_at_k,
        "baseline": baseline,
        "represented": represented,
    }
    found = estimate_advantages(loss.advantage, values, group_ids, undiscounted=earned, **options)
    of_earned = estimate_advantages(loss.advantage, earned, group_ids, **options)
    centred = estimate_advantages("dr_grpo", values, group_ids, represented=represented).advantages.tolist()
    scales = call_scales(rewarded, found)
    sizes: dict[str, float] = {}
    for group, of_rollout in zip(group_ids, rewarded, strict=True):
        sizes[group] = max(sizes.get(group, 0.0), *(credit.size for credit in of_rollout))
    rollouts = list(map(RolloutAdvantage, found.advantages.tolist(), of_earned.advantages.tolist()))
    for index, rollout in enumerate(rollouts):
        means, tolerance = CallMeans.of(rewarded[index]), _ROUNDING * sizes[group_ids[index]]
        for span_id, credit in credits[index].items():
            value = means.advantage(credit, rollout.value, scales[index])
            differs = abs(means.advantage(credit, centred[index], 1.0)) > tolerance
            rollout.calls[span_id] = CallAdvantage(value, abs(value * scales[index]) > tolerance, differs)
    return rollouts


def gdpo_call_advantages(
    dimensions: Sequence[tuple[float, Sequence[CallCredits]]], group_ids: Sequence[str], represented: Tensor
) -> list[RolloutAdvantage]:
    """Advantages gdpo of rollouts and their calls, from the weight of each dimension and its credits by rollout.

    A_c = (sum over dimensions of  weight * A_c of grpo  - mean) / (std + 1e-4), with mean and std of the same sums of
    the rollouts of the batch (arXiv 2601.05242). A dimension without a credit in a rollout or call adds 0 there.
    """
    totals = [RolloutAdvantage() for _ in group_ids]
    for weight, credits in dimensions:
        known = [index for index, of_rollout in enumerate(credits) if of_rollout and weight]
        grpo = LossConfig(advantage="grpo")
        parts = [credits[i] for i in known], [group_ids[i] for i in known]
        found = call_advantages(*parts, grpo, represented[known]) if known else []
        for index, rollout in zip(known, found, strict=True):
            totals[index].value += weight * rollout.value
            totals[index].undiscounted += weight * rollout.undiscounted
            for span_id, call in rollout.calls.items():
                total = totals[index].calls.get(span_id, CallAdvantage(0.0, False, False))
                value = total.value + weight * call.value
                totals[index].calls[span_id] = CallAdvantage(
                    value, total.trains or call.trains, total.differs or call.differs
                )
    sums, undiscounted = torch.tensor([(one.value, one.undiscounted) for one in totals], dtype=torch.float64).unbind(1)
    of_batch = estimate_advantages("reinforce++", sums, group_ids, undiscounted=undiscounted, represented=represented)
    means = Population.of([""] * len(totals), represented).means(sums).tolist()
    scales = [1.0] * len(totals) if of_batch.divisors is None else of_batch.divisors.tolist()
    return list(map(_normalised, totals, means, scales))


def _normalised(total: RolloutAdvantage, mean: float, divisor: float) -> RolloutAdvantage:
    calls = {
        span_id: CallAdvantage((call.value - mean) / divisor, call.trains and abs(call.value) > _ROUNDING, call.differs)
        for span_id, call in total.calls.items()
    }
    return RolloutAdvantage((total.value - mean) / divisor, calls=calls)
