"""Advantages: how much better a rollout did than its group. Pure functions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from agl.errors import TrainingError

EPSILON = 1e-4
"""Added to the standard deviation, as TRL does."""


def advantage(value: float, mean: float, deviation: float) -> float:
    """(value - mean) / (deviation + eps): DeepSeekMath, arXiv 2402.03300, section 4.1.2."""
    return (value - mean) / (deviation + EPSILON)


def group_statistics(rewards: Tensor, group_ids: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of the group of each rollout, both [R]; the deviation of one is 0."""
    if len(rewards) != len(group_ids):
        raise TrainingError(f"got {len(rewards)} rewards for {len(group_ids)} group ids")
    if not rewards.isfinite().all():
        where = int((~rewards.isfinite()).nonzero()[0])
        raise TrainingError(f"group {group_ids[where]}: reward {rewards[where]} is not finite")
    means, deviations = torch.empty_like(rewards), torch.empty_like(rewards)
    for group in dict.fromkeys(group_ids):
        members = torch.tensor([other == group for other in group_ids])
        values = rewards[members]
        means[members] = values.mean()
        deviations[members] = values.std() if len(values) > 1 else 0.0
    return means, deviations
