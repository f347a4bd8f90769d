"""Advantages: how much better a rollout did than others. Pure functions of the rewards [R] of R rollouts.

Advantage gdpo compares each of D reward dimensions by itself: its rewards are [R, D].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, get_args

import torch
from torch import Tensor

from agl.config import AdvantageName, RewardScale
from agl.errors import TrainingError

ADVANTAGES: tuple[AdvantageName, ...] = get_args(AdvantageName)
_OPTIONS = {"grpo": {"scale_rewards"}, "gdpo": {"weights"}, "max@k": {"k"}, "ema": {"baseline"}}

EPSILON = 1e-4
"""Added to a standard deviation before dividing by it, as in TRL."""


@dataclass(frozen=True, slots=True)
class Population:
    """R rollouts in sets, of which statistics are taken. Each rollout may stand for others that are not there.

    Sampling keeps a rollout with a probability p that depends on its reward. One that is kept stands for 1/p, so sums
    over all are those of x/p over the kept ones (Horvitz and Thompson, 1952), and means are their ratio.
    """

    sets: Tensor
    """Number of its set for each rollout [R]."""
    represented: Tensor
    """How many rollouts each stands for [R], or a common multiple of that."""

    @classmethod
    def of(cls, names: Sequence[str], represented: Tensor) -> Self:
        """`names`: of the set of each rollout."""
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return cls(torch.tensor([numbers[name] for name in names], device=represented.device), represented)

    def means(self, values: Tensor) -> Tensor:
        """For each rollout the mean of `values` [R] in its set; without a rounding error if all are equal."""
        least = torch.zeros_like(values).scatter_reduce(0, self.sets, values, "amin", include_self=False)[self.sets]
        return least + self._totals(self.represented * (values - least)) / self._totals(self.represented)

    def deviations(self, values: Tensor) -> Tensor:
        """For each rollout the standard deviation of `values` [R] in its set of n: unbiased, and 0 if n is 1.

        Where rollouts represent unlike numbers, n is that of equal ones (sum of w)^2 / sum of w^2 (Kish, 1965).
        """
        inverse_size = self._totals(self.represented**2) / self._totals(self.represented) ** 2
        variances = self.means((values - self.means(values)) ** 2) / (1 - inverse_size)
        return torch.where(self.counts() > 1, variances, 0.0).sqrt()

    def counts(self) -> Tensor:
        """For each rollout the number of those that are in its set."""
        return self.sets.bincount()[self.sets]

    def _totals(self, values: Tensor) -> Tensor:
        return torch.zeros_like(values).index_add_(0, self.sets, values)[self.sets]


@dataclass(frozen=True, slots=True)
class AdvantageEstimate:
    """Advantages [R] and, of those with a divisor, the standard deviations [R] and the rollouts that share one."""

    advantages: Tensor
    divisors: Tensor | None = None
    deviations: Tensor | None = None
    scaled_together: Population | None = None


def group_advantages(
    name: str,
    rewards: Tensor | Sequence[float],
    group_ids: Sequence[str],
    *,
    represented: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Advantages [R] of `rewards` [R] in their groups. NaN is a missing reward: not in its group, with advantage 0.

    grpo: (R - mean of the group) / (std + 1e-4); option `scale_rewards` as in TRL: the std of the `group` (arXiv
    2402.03300, section 4.1.2), of the `batch` (arXiv 2508.08221), or `none`.
    dr_grpo: R - mean of the group (arXiv 2503.20783).
    rloo: R - mean of the other rollouts of the group (arXiv 2402.14740, section 2.2).
    reinforce++: (R - mean) / (std + 1e-4), both of the batch; reinforce++_baseline: the same of R - mean of the group
    (arXiv 2501.03262).
    gdpo: `rewards` is [R, D] or [R]; grpo of each of the D dimensions, then reinforce++ of their sum, with a weight for
    each as option `weights`, 1 by default (arXiv 2601.05242; `normalize_then_sum` in TRL). A missing dimension adds 0.
    max@k: see `max_at_k`, option `k`.
    ema: R - `baseline`, a running mean of earlier rewards (SPIRAL, arXiv 2506.24119, section 3.3): `next_baseline`.
    `represented` [R] is how many rollouts each one stands for, if sampling left others out; see `Population`.
    Raises TrainingError for an unknown name or option, an infinite reward, or a wrong number of group ids.
    """
    values = torch.as_tensor(rewards)
    values = values if values.is_floating_point() else values.double()
    _check(values, group_ids, dimensions=2 if name == "gdpo" and values.dim() == 2 else 1)
    allowed = _OPTIONS.get(name, set())
    if unknown := sorted(set(options) - allowed):
        raise TrainingError(
            f"advantage {name} has no option {', '.join(unknown)}; it has {', '.join(allowed) or 'none'}"
        )
    represented = torch.ones_like(values if values.dim() == 1 else values[:, 0]) if represented is None else represented
    if name == "gdpo":
        return _gdpo_advantages(values, group_ids, represented, **options)
    is_known = ~values.isnan()
    known_groups = [group for group, known in zip(group_ids, is_known.tolist(), strict=True) if known]
    advantages = torch.zeros_like(values)
    found = estimate_advantages(name, values[is_known], known_groups, represented=represented[is_known], **options)
    advantages[is_known] = found.advantages
    return advantages


def estimate_advantages(
    name: str,
    rewards: Tensor,
    group_ids: Sequence[str],
    *,
    scale_rewards: RewardScale = "group",
    k: int = 4,
    baseline: float = 0.0,
    undiscounted: Tensor | None = None,
    represented: Tensor | None = None,
) -> AdvantageEstimate:
    """`group_advantages` of rewards without NaN, and their divisors. An advantage ignores the options of others.

    Standard deviations are those of `undiscounted` [R], the rewards before discounts (default: `rewards`). Where
    discounts differ more than these, nothing is divided, so that a small difference of discounts is not magnified.
    """
    if name not in ADVANTAGES:
        raise TrainingError(f"advantage {name!r} is not known; expected one of {', '.join(ADVANTAGES)}")
    represented = torch.ones_like(rewards) if represented is None else represented
    groups, batch = Population.of(group_ids, represented), Population.of([""] * len(rewards), represented)
    earned = rewards if undiscounted is None else undiscounted
    centred = rewards - groups.means(rewards)
    match name:
        case "grpo" if scale_rewards in ("group", "batch"):
            return _divided(centred, earned, earned - rewards, groups if scale_rewards == "group" else batch)
        case "grpo" if scale_rewards != "none":
            raise TrainingError(f"scale_rewards is {scale_rewards!r}, expected group, batch or none")
        case "grpo" | "dr_grpo":
            return AdvantageEstimate(centred)
        case "rloo":
            # R - mean of the others = (R - mean of all) * n / (n - 1)
            counts = groups.counts()
            return AdvantageEstimate(centred * counts / (counts - 1).clamp(min=1))
        case "reinforce++":
            return _divided(rewards - batch.means(rewards), earned, earned - rewards, batch)
        case "reinforce++_baseline":
            of_earned = earned - groups.means(earned)
            return _divided(centred - batch.means(centred), of_earned, of_earned - centred, batch)
        case "gdpo":
            of_group = _divided(centred, earned, earned - rewards, groups).advantages
            of_earned = _divided(earned - groups.means(earned), earned, torch.zeros_like(earned), groups).advantages
            return _divided(of_group - batch.means(of_group), of_earned, of_earned - of_group, batch)
        case "max@k":
            gains = torch.empty_like(rewards)
            for indices in group_members(group_ids, rewards.device):
                gains[indices] = max_at_k(rewards[indices], k)
            return AdvantageEstimate(gains)
        case _:
            return AdvantageEstimate(rewards - baseline)


def _gdpo_advantages(
    rewards: Tensor, group_ids: Sequence[str], represented: Tensor, weights: Sequence[float] | None = None
) -> Tensor:
    """Advantages [R] of `rewards` [R, D], or [R] for one dimension."""
    columns = rewards.reshape(len(rewards), -1).unbind(1)
    weights = [1.0] * len(columns) if weights is None else weights
    if len(weights) != len(columns):
        raise TrainingError(f"gdpo has {len(weights)} weights, expected one for each of {len(columns)} dimensions")
    of_groups = [group_advantages("grpo", column, group_ids, represented=represented) for column in columns]
    total = torch.stack([weight * each for weight, each in zip(weights, of_groups, strict=True)]).sum(0)
    total[rewards.reshape(len(rewards), -1).isnan().all(1)] = math.nan
    return group_advantages("reinforce++", total, group_ids, represented=represented)


def max_at_k(rewards: Tensor, k: int) -> Tensor:
    """Advantages [n] of one group that raise the expected best reward of k rollouts, for `k` from 2 to n.

    Over all subsets I of k rollouts,  A_i = n / C(n, k) * sum over I that contain i of  max(I) - max(I without i):
    unbiased for the gradient of max@k, and the baseline does not depend on i (PKPO, arXiv 2505.15201, section 4).
    The term is not 0 only if i is the best of I; the second best is then j in C(rank of j, k - 2) subsets. If the group
    is smaller than k, k is its size; a single rollout has advantage 0.
    """
    if k < 2:
        raise TrainingError(f"max@k has k {k}, expected at least 2; k 1 is rloo")
    count, values = len(rewards), rewards.sort()
    if count < 2:
        return torch.zeros_like(rewards)
    k = min(k, count)
    subsets = rewards.new_tensor([math.comb(rank, k - 2) for rank in range(count)])
    below = values.values[:, None] - values.values[None, :]
    gains = (below.tril(-1) * subsets).sum(1) * (count / math.comb(count, k))
    return torch.empty_like(rewards).index_copy_(0, values.indices, gains)


def next_baseline(
    baseline: float, weight: float, rewards: Tensor, decay: float, represented: Tensor | None = None
) -> tuple[float, float]:
    """Running mean and its weight after a step that compared `rewards` [R] with `baseline`; both begin at 0.

    After n steps the weight is 1 - decay^n: the mean is corrected for its start as Adam's moments are (arXiv 1412.6980,
    section 3). `represented` [R]: as of `Population`.
    """
    total, shares = decay * weight + (1 - decay), torch.ones_like(rewards) if represented is None else represented
    mean = ((shares * rewards).sum() / shares.sum()).item()
    return (decay * weight * baseline + (1 - decay) * mean) / total if total else baseline, total


def group_members(group_ids: Sequence[str], device: torch.device | None = None) -> list[Tensor]:
    """For each group the indices [n] of its rollouts; groups are in order of first appearance."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(group_ids):
        members.setdefault(group, []).append(index)
    return [torch.tensor(indices, device=device) for indices in members.values()]


def _divided(centred: Tensor, earned: Tensor, discounted_by: Tensor, scaled_together: Population) -> AdvantageEstimate:
    """`centred` / (std of `earned` + 1e-4), but undivided where `discounted_by` has a larger std; all [R]."""
    deviations = scaled_together.deviations(earned)
    divisors = torch.where(deviations < scaled_together.deviations(discounted_by), 1.0, deviations + EPSILON)
    return AdvantageEstimate(centred / divisors, divisors, deviations, scaled_together)


def _check(rewards: Tensor, group_ids: Sequence[str], dimensions: int) -> None:
    if rewards.dim() != dimensions or len(rewards) != len(group_ids):
        raise TrainingError(f"got rewards of shape {list(rewards.shape)} for {len(group_ids)} group ids")
    if rewards.isinf().any():
        index = int(rewards.isinf().nonzero()[0, 0])
        raise TrainingError(f"group {group_ids[index]}: reward {rewards[index]} is not finite")
