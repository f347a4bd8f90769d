"""Advantages: how much better a rollout did than others. Pure functions of the rewards [R] of R rollouts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from agl.config import AdvantageName, RewardScale
from agl.errors import TrainingError

ADVANTAGES: tuple[AdvantageName, ...] = get_args(AdvantageName)
_OPTIONS = {"grpo": {"scale_rewards"}, "max@k": {"k"}, "ema": {"baseline"}}

EPSILON = 1e-4
"""Added to a standard deviation before dividing by it, as in TRL."""


@dataclass(frozen=True, slots=True)
class AdvantageEstimate:
    """Advantages [R], and the standard deviations [R] that they were divided by, if they were."""

    advantages: Tensor
    deviations: Tensor | None = None


def group_advantages(name: str, rewards: Tensor | Sequence[float], group_ids: Sequence[str], **options: Any) -> Tensor:
    """Advantages [R] of `rewards` [R] in their groups. NaN is a missing reward: not in its group, with advantage 0.

    grpo: (R - mean of the group) / (std + 1e-4); option `scale_rewards` as in TRL: the std of the `group` (arXiv
    2402.03300, section 4.1.2), of the `batch` (arXiv 2508.08221), or `none`.
    dr_grpo: R - mean of the group (arXiv 2503.20783).
    rloo: R - mean of the other rollouts of the group (arXiv 2402.14740, section 2.2).
    reinforce++: (R - mean) / (std + 1e-4), both of the batch; reinforce++_baseline: the same of R - mean of the group
    (arXiv 2501.03262).
    max@k: see `max_at_k`, option `k`.
    ema: R - `baseline`, a running mean of earlier rewards (SPIRAL, arXiv 2506.24119, section 3.3): `next_baseline`.
    Raises TrainingError for an unknown name or option, an infinite reward, or a wrong number of group ids.
    """
    values = torch.as_tensor(rewards)
    values = values if values.is_floating_point() else values.double()
    _check(values, group_ids)
    allowed = _OPTIONS.get(name, set())
    if unknown := sorted(set(options) - allowed):
        raise TrainingError(
            f"advantage {name} has no option {', '.join(unknown)}; it has {', '.join(allowed) or 'none'}"
        )
    is_known = ~values.isnan()
    known_groups = [group for group, known in zip(group_ids, is_known.tolist(), strict=True) if known]
    advantages = torch.zeros_like(values)
    advantages[is_known] = estimate_advantages(name, values[is_known], known_groups, **options).advantages
    return advantages


def estimate_advantages(
    name: str,
    rewards: Tensor,
    group_ids: Sequence[str],
    *,
    scale_rewards: RewardScale = "group",
    k: int = 4,
    baseline: float = 0.0,
) -> AdvantageEstimate:
    """`group_advantages` of rewards without NaN, and their divisors. An advantage ignores the options of others."""
    if name not in ADVANTAGES:
        raise TrainingError(f"advantage {name!r} is not known; expected one of {', '.join(ADVANTAGES)}")
    groups = group_members(group_ids, rewards.device)
    match name:
        case "grpo":
            return _grpo(rewards, groups, scale_rewards)
        case "dr_grpo":
            return _grpo(rewards, groups, "none")
        case "rloo":
            return AdvantageEstimate(_leave_one_out(rewards, groups))
        case "reinforce++":
            return _standardised(rewards)
        case "reinforce++_baseline":
            return _standardised(_grpo(rewards, groups, "none").advantages)
        case "max@k":
            return AdvantageEstimate(_over_groups(rewards, groups, lambda values: max_at_k(values, k)))
        case _:
            return AdvantageEstimate(rewards - baseline)


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


def next_baseline(baseline: float, rewards: Tensor, decay: float) -> float:
    """decay * baseline + (1 - decay) * mean of `rewards` [R], for use after the step that compared them with it."""
    return decay * baseline + (1 - decay) * rewards.mean().item()


def group_members(group_ids: Sequence[str], device: torch.device | None = None) -> list[Tensor]:
    """For each group the indices [n] of its rollouts; groups are in order of first appearance."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(group_ids):
        members.setdefault(group, []).append(index)
    return [torch.tensor(indices, device=device) for indices in members.values()]


def _grpo(rewards: Tensor, groups: Sequence[Tensor], scale: RewardScale) -> AdvantageEstimate:
    centred = _over_groups(rewards, groups, lambda values: values - values.mean())
    match scale:
        case "none":
            return AdvantageEstimate(centred)
        case "group":
            deviations = _over_groups(rewards, groups, lambda values: _deviation(values).expand(len(values)))
        case "batch":
            deviations = _deviation(rewards).expand_as(rewards)
        case _:
            raise TrainingError(f"scale_rewards is {scale!r}, expected group, batch or none")
    return AdvantageEstimate(centred / (deviations + EPSILON), deviations)


def _standardised(values: Tensor) -> AdvantageEstimate:
    deviations = _deviation(values).expand_as(values)
    return AdvantageEstimate((values - values.mean()) / (deviations + EPSILON), deviations)


def _leave_one_out(rewards: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """R - mean of the others = (R - mean of all) * n / (n - 1); 0 for a single rollout."""
    return _over_groups(
        rewards, groups, lambda values: (values - values.mean()) * (len(values) / max(len(values) - 1, 1))
    )


def _over_groups(rewards: Tensor, groups: Sequence[Tensor], function: Callable[[Tensor], Tensor]) -> Tensor:
    found = torch.empty_like(rewards)
    for indices in groups:
        found[indices] = function(rewards[indices])
    return found


def _deviation(values: Tensor) -> Tensor:
    """Unbiased standard deviation; 0 for a single value."""
    return values.std() if len(values) > 1 else values.new_zeros(())


def _check(rewards: Tensor, group_ids: Sequence[str]) -> None:
    if rewards.dim() != 1 or len(rewards) != len(group_ids):
        raise TrainingError(f"got rewards of shape {list(rewards.shape)} for {len(group_ids)} group ids")
    if rewards.isinf().any():
        index = int(rewards.isinf().nonzero()[0])
        raise TrainingError(f"group {group_ids[index]}: reward {rewards[index]} is not finite")
