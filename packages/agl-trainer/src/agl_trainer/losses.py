"""Policy losses on [B, T] tensors of the trained tokens. Pure functions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from agl.errors import TrainingError

_LOG_RATIO_BOUND = 20.0
"""exp of more than this is no probability ratio but an overflow."""


def policy_loss(
    name: str,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    rollout_ids: Sequence[str] | None = None,
    weights: Tensor | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Loss and statistics of one variant; all tensors [B, T], `mask` bool.

    grpo (arXiv 2402.03300, eq. 3, without the KL term): -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A).
    `weights` [B, T] multiply the token losses, which are then summed; by default they are `rollout_weights`.
    Raises TrainingError for an unknown name or shapes that differ.
    """
    if name != "grpo":
        raise TrainingError(f"loss {name!r} is not known; expected grpo")
    shapes = {tuple(tensor.shape) for tensor in (logprobs, old_logprobs, advantages, mask)}
    if len(shapes) != 1:
        raise TrainingError(f"logprobs, old_logprobs, advantages and mask differ in shape: {sorted(shapes)}")
    if weights is None:
        weights = rollout_weights(mask, rollout_ids or [str(row) for row in range(len(mask))])
    log_ratio = ((logprobs - old_logprobs) * mask).clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)
    high = epsilon if epsilon_high is None else epsilon_high
    token_losses, clipped = _clipped_surrogate(log_ratio.exp(), advantages, epsilon, high)
    loss = (token_losses * weights * mask).sum()
    return loss, _statistics(log_ratio.detach(), clipped, mask)


def rollout_weights(mask: Tensor, rollout_ids: Sequence[str]) -> Tensor:
    """1 / (T_r N): tokens of a rollout share its 1/N, N rollouts in all, however many rows and tokens each has."""
    tokens = dict.fromkeys(rollout_ids, 0)
    for rollout_id, count in zip(rollout_ids, mask.sum(1).tolist(), strict=True):
        tokens[rollout_id] += count
    shares = [1 / (tokens[rollout_id] * len(tokens)) if tokens[rollout_id] else 0.0 for rollout_id in rollout_ids]
    return torch.tensor(shares, dtype=torch.float32)[:, None].expand(mask.shape)


def _clipped_surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped objective, negated (arXiv 1707.06347, eq. 7), and where the clip took the gradient away."""
    clipped = ratio.clamp(1 - low, 1 + high)
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    return losses, (ratio * advantages > clipped * advantages).detach()


def _statistics(log_ratio: Tensor, clipped: Tensor, mask: Tensor) -> dict[str, float]:
    """`kl`: from the sampling policy, by the k3 estimator (joschu.net/blog/kl-approx.html)."""
    ratios = log_ratio[mask].exp()
    return {
        "clip_fraction": clipped[mask].float().mean().item(),
        "ratio_max": ratios.max().item(),
        "ratio_min": ratios.min().item(),
        "kl": (ratios - 1 - log_ratio[mask]).mean().item(),
    }
