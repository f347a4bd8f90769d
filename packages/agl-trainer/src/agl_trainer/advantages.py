"""Advantages: how much better a rollout did than its group. Pure functions."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from agl.errors import TrainingError

Scale = Literal["group", "batch", "none"]

_EPSILON = 1e-4
"""Added to the standard deviation, as TRL does."""


def group_baselines(values: Tensor, group_ids: Sequence[str], scale: Scale) -> tuple[Tensor, Tensor]:
    """What to subtract from each value [R] and what to divide by, both [R]: advantage = (value - mean) / divisor.

    The mean is that of the value's group. The divisor is the group's standard deviation (`group`: GRPO, arXiv
    2402.03300, section 4.1.2), that of all values (`batch`: arXiv 2508.08221, section 4.2), or 1 (`none`: Dr. GRPO,
    arXiv 2503.20783). Division by the group's makes as much of a small difference in one group as of a large one in
    another. Raises TrainingError as `group_statistics`.
    """
    means, deviations = group_statistics(values, group_ids)
    if scale == "none":
        return means, torch.ones_like(values)
    if scale == "batch":
        deviations = torch.full_like(values, float(values.std()) if len(values) > 1 else 0.0)
    return means, deviations + _EPSILON


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
