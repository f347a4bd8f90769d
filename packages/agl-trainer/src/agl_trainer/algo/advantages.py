"""Advantages: how much better a rollout did than others. Pure functions of the rewards [R] of the rollouts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from agl.errors import TrainingError

AdvantageName = Literal["grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "max@k", "ema"]
ADVANTAGES: tuple[AdvantageName, ...] = get_args(AdvantageName)
Scale = Literal["group", "batch", "none"]

EPSILON = 1e-4
"""Added to a standard deviation, as TRL does."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Advantages [R], and the standard deviation [R] that they were divided by; None where they were not."""

    advantages: Tensor
    deviations: Tensor | None = None


def group_advantages(name: str, rewards: Tensor | Sequence[float], group_ids: Sequence[str], **options: Any) -> Tensor:
    """Advantages [R] of `rewards` [R] in their groups; NaN is a missing reward: in no group, its advantage is 0.

    grpo: (R - mean of the group) / (std + 1e-4), option `scale_rewards` as in TRL: the std of the `group` (arXiv
    2402.03300, section 4.1.2), of the `batch` (arXiv 2508.08221), or `none`.
    dr_grpo: R - mean of the group (arXiv 2503.20783).
    rloo: R - mean of the others of the group (arXiv 2402.14740, section 2.2).
    reinforce++: (R - mean) / (std + 1e-4), both of the batch; reinforce++_baseline: the same of R - mean of the group
    (arXiv 2501.03262).
    max@k: see `max_at_k`, option `k`.
    ema: R - `baseline`, a running mean of earlier rewards (SPIRAL, arXiv 2506.24119, section 3.3): `next_baseline`.
    Raises TrainingError for a name, option, reward or number of group ids that cannot be meant.
    """
    values = torch.as_tensor(rewards)
    values = values if values.is_floating_point() else values.double()
    _check(values, group_ids)
    present = ~values.isnan()
    known = [group for group, there in zip(group_ids, present.tolist(), strict=True) if there]
    advantages = torch.zeros_like(values)
    advantages[present] = estimate(name, values[present], known, **options).advantages
    return advantages


def estimate(name: str, rewards: Tensor, group_ids: Sequence[str], **options: Any) -> Estimate:
    """`group_advantages` of rewards that are all there, with what they were divided by."""
    if name not in ADVANTAGES:
        raise TrainingError(f"advantage {name!r} is not known; expected one of {', '.join(ADVANTAGES)}")
    allowed = {"grpo": {"scale_rewards"}, "max@k": {"k"}, "ema": {"baseline"}}.get(name, set())
    if unknown := sorted(set(options) - allowed):
        raise TrainingError(
            f"advantage {name} has no option {', '.join(unknown)}; it has {', '.join(allowed) or 'none'}"
        )
    groups = group_members(group_ids, rewards.device)
    match name:
        case "grpo":
            return _grpo(rewards, groups, options.get("scale_rewards", "group"))
        case "dr_grpo":
            return _grpo(rewards, groups, "none")
        case "rloo":
            return Estimate(_leave_one_out(rewards, groups))
        case "reinforce++":
            return _standardised(rewards)
        case "reinforce++_baseline":
            return _standardised(_grpo(rewards, groups, "none").advantages)
        case "max@k":
            return Estimate(_over_groups(rewards, groups, lambda values: max_at_k(values, options.get("k", 4))))
        case _:
            return Estimate(rewards - options.get("baseline", 0.0))


def max_at_k(rewards: Tensor, k: int) -> Tensor:
    """Advantages [n] of one group that raise the expected best reward of k rollouts, for `k` from 2 to n.

    Over all subsets I of k rollouts,  A_i = n / C(n, k) * sum over I that hold i of  max(I) - max(I without i):
    unbiased for the gradient of max@k, and the baseline does not depend on i (PKPO, arXiv 2505.15201, section 4).
    Only where i is the best of I is the term not 0; the second best is then j in C(rank of j, k - 2) subsets. A group
    smaller than k takes its own size for k; one rollout alone has no advantage.
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
    """decay * baseline + (1 - decay) * mean of `rewards` [R], after these were compared with `baseline`."""
    return decay * baseline + (1 - decay) * rewards.mean().item()


def group_members(group_ids: Sequence[str], device: torch.device | None = None) -> list[Tensor]:
    """For each group the places [n] of its rollouts, in the order in which groups are first named."""
    members: dict[str, list[int]] = {}
    for place, group in enumerate(group_ids):
        members.setdefault(group, []).append(place)
    return [torch.tensor(places, device=device) for places in members.values()]


def _grpo(rewards: Tensor, groups: Sequence[Tensor], scale: Scale) -> Estimate:
    centred = _over_groups(rewards, groups, lambda values: values - values.mean())
    match scale:
        case "none":
            return Estimate(centred)
        case "group":
            deviations = _over_groups(rewards, groups, lambda values: _deviation(values).expand(len(values)))
        case "batch":
            deviations = _deviation(rewards).expand_as(rewards)
        case _:
            raise TrainingError(f"scale_rewards is {scale!r}, expected group, batch or none")
    return Estimate(centred / (deviations + EPSILON), deviations)


def _standardised(values: Tensor) -> Estimate:
    deviations = _deviation(values).expand_as(values)
    return Estimate((values - values.mean()) / (deviations + EPSILON), deviations)


def _leave_one_out(rewards: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """R - mean of the others = (R - mean of all) * n / (n - 1); 0 for a rollout alone."""
    return _over_groups(
        rewards, groups, lambda values: (values - values.mean()) * (len(values) / max(len(values) - 1, 1))
    )


def _over_groups(rewards: Tensor, groups: Sequence[Tensor], function: Any) -> Tensor:
    found = torch.empty_like(rewards)
    for places in groups:
        found[places] = function(rewards[places])
    return found


def _deviation(values: Tensor) -> Tensor:
    """Unbiased; 0 of one value."""
    return values.std() if len(values) > 1 else values.new_zeros(())


def _check(rewards: Tensor, group_ids: Sequence[str]) -> None:
    if rewards.dim() != 1 or len(rewards) != len(group_ids):
        raise TrainingError(f"got rewards of shape {list(rewards.shape)} for {len(group_ids)} group ids")
    if rewards.isinf().any():
        where = int(rewards.isinf().nonzero()[0])
        raise TrainingError(f"group {group_ids[where]}: reward {rewards[where]} is not finite")
