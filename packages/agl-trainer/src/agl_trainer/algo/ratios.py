"""Importance ratios between policies, and their bounds. Tensors are [B, T]; `mask` is bool."""

import math

import torch
from torch import Tensor

from agl.config import PolicyLossConfig

_MAX_LOG_RATIO = 20.0
"""Bound of log ratios, so that their exponential does not overflow."""
_MIN_RATIO = 1e-8


def log_ratios(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, level: str) -> Tensor:
    """log of the importance ratio rho of each token [B, T], or of each sequence [B, 1].

    token (PPO, arXiv 1707.06347, eq. 6): log rho_t = logprob_t - old_t
    sequence (GSPO, arXiv 2507.18071, eq. 7): log rho = sum over t of (logprob_t - old_t) / T
    """
    difference = (logprobs - old_logprobs) * mask
    if level == "sequence":
        difference = difference.sum(1, keepdim=True) / _lengths(mask)
    return difference.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def sampling_correction(
    old_logprobs: Tensor, sampling_logprobs: Tensor, mask: Tensor, loss: PolicyLossConfig
) -> tuple[Tensor, Tensor]:
    """Weight of each token [B, T] or sequence [B, 1] if the engine's policy differs from the old policy.

        w = exp(old - sampling), for a sequence the product over its tokens
        truncate: w clamped to [clip_min, clip_max]; mask: 0 outside of it

    Truncated importance sampling: Ionides 2008, DOI 10.1198/106186008X320456, eq. 3. A sampling logprob of NaN was not
    reported by the engine and is not corrected. The second tensor is True where w was outside of the bounds.
    """
    mode = loss.importance_sampling_mode or ""
    log_weight = ((old_logprobs - sampling_logprobs) * mask).detach().nan_to_num(nan=0.0)
    if mode.startswith("sequence"):
        log_weight = log_weight.sum(1, keepdim=True)
    weight = log_weight.clamp(max=_MAX_LOG_RATIO).exp()
    low, high = loss.importance_sampling_clip_min, loss.importance_sampling_clip_max
    low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
    outside = (weight < low) | (weight > high)
    return (weight.masked_fill(outside, 0.0) if mode.endswith("mask") else weight.clamp(low, high)), outside


def off_policy_mask(
    logprobs: Tensor, sampling_logprobs: Tensor, advantages: Tensor, mask: Tensor, threshold: float
) -> Tensor:
    """False [B, T] for sequences of negative advantage whose KL divergence from the sampling policy is too high.

    keep if A >= 0 or mean over t of (sampling_t - logprob_t) <= threshold (DeepSeek-V3.2, arXiv 2512.02556, eq. 9).
    """
    divergence = ((sampling_logprobs - logprobs.detach()) * mask).nan_to_num(nan=0.0).sum(1, keepdim=True)
    return (advantages >= 0) | (divergence / _lengths(mask) <= threshold)


def high_entropy_threshold(entropies: Tensor, quantile: float) -> float:
    """Entropy that the share `quantile` of the tokens exceeds, from the entropies [N] of all tokens, in nats.

    Beyond the 80/20 rule, arXiv 2506.01939, eq. 5.
    """
    if not len(entropies):
        return math.inf
    values = entropies.detach().double().sort().values
    rank = (len(values) - 1) * (1 - quantile)
    return torch.lerp(values[math.floor(rank)], values[math.ceil(rank)], rank - math.floor(rank)).item()


def vespo_weight(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    correction: Tensor | None,
    loss: PolicyLossConfig,
) -> Tensor:
    """phi [B, T] of VESPO (arXiv 2602.10693): a soft bound on the ratio w of the whole sequence, without gradient.

    phi(w) = w^k exp(lambda (1 - w)), so phi(1) = 1, with a k and a lambda for each sign of the advantage;
    w is the product over the tokens of exp(logprob_t - old_t), times the tokens' sampling `correction`.
    """
    log_w = log_ratios(logprobs.detach(), old_logprobs, mask, "token").sum(1, keepdim=True)
    min_log_ratio = math.log(_MIN_RATIO)
    if correction is not None:
        log_w = log_w + (correction.log().clamp(min_log_ratio, _MAX_LOG_RATIO) * mask).sum(1, keepdim=True)
    log_w = log_w.clamp(min_log_ratio, _MAX_LOG_RATIO)
    is_positive = advantages >= 0
    k = torch.where(is_positive, loss.vespo_k_pos, loss.vespo_k_neg)
    slope = torch.where(is_positive, loss.vespo_lambda_pos, loss.vespo_lambda_neg).clamp(min=1e-4)
    return (slope + k * log_w - slope * log_w.exp()).exp()


def _lengths(mask: Tensor) -> Tensor:
    return mask.sum(1, keepdim=True).clamp(min=1)
