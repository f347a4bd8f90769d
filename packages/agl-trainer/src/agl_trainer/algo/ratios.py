"""Probability ratios between policies, and how far each may be trusted. Tensors are [B, T]; `mask` is bool."""

import math

import torch
from torch import Tensor

from agl_trainer.algo.options import LossOptions

_BOUND = 20.0
"""exp of more than this is no probability ratio but an overflow."""
_LEAST = 1e-8


def log_ratios(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, level: str) -> Tensor:
    """log of the ratio rho: of each token [B, T], or of each sequence [B, 1].

    token (PPO, arXiv 1707.06347, eq. 6): log rho_t = logprob_t - old_t
    sequence (GSPO, arXiv 2507.18071, eq. 7): log rho = sum over t of (logprob_t - old_t) / T
    """
    difference = (logprobs - old_logprobs) * mask
    if level == "sequence":
        difference = difference.sum(1, keepdim=True) / _lengths(mask)
    return difference.clamp(-_BOUND, _BOUND)


def sampling_correction(
    old_logprobs: Tensor, sampling_logprobs: Tensor, mask: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Weight of each token [B, T] or sequence [B, 1] where the engine sampled by another policy than the old one.

        w = exp(old - sampling), of a sequence the product over its tokens
        truncate: w cut to [clip_min, clip_max]; mask: 0 outside of it

    Truncated importance sampling: Ionides 2008, DOI 10.1198/106186008X320456, eq. 3. A NaN among the sampling
    logprobs is one that the engine did not report: it is not corrected. The second tensor is True where w was cut.
    """
    mode = options.vllm_importance_sampling_mode or ""
    log_weight = ((old_logprobs - sampling_logprobs) * mask).detach().nan_to_num(nan=0.0)
    if mode.startswith("sequence"):
        log_weight = log_weight.sum(1, keepdim=True)
    weight = log_weight.clamp(max=_BOUND).exp()
    low, high = options.vllm_importance_sampling_clip_min, options.vllm_importance_sampling_clip_max
    low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
    cut = (weight < low) | (weight > high)
    return (weight.masked_fill(cut, 0.0) if mode.endswith("mask") else weight.clamp(low, high)), cut


def off_policy_mask(
    logprobs: Tensor, sampling_logprobs: Tensor, advantages: Tensor, mask: Tensor, threshold: float
) -> Tensor:
    """False [B, T] where a bad sequence has gone further than `threshold` from the policy that sampled it.

    keep where A >= 0 or mean over t of (sampling_t - logprob_t) <= threshold (DeepSeek-V3.2, arXiv 2512.02556, eq. 9).
    """
    distance = ((sampling_logprobs - logprobs.detach()) * mask).nan_to_num(nan=0.0).sum(1, keepdim=True)
    return (advantages >= 0) | (distance / _lengths(mask) <= threshold)


def high_entropy_threshold(entropies: Tensor, quantile: float) -> float:
    """Entropy above which lies the share `quantile` of the tokens, given those of all tokens [N], in nats.

    Beyond the 80/20 rule, arXiv 2506.01939, eq. 5.
    """
    if not len(entropies):
        return math.inf
    values = entropies.detach().double().sort().values
    place = (len(values) - 1) * (1 - quantile)
    return torch.lerp(values[math.floor(place)], values[math.ceil(place)], place - math.floor(place)).item()


def vespo_weight(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    correction: Tensor | None,
    options: LossOptions,
) -> Tensor:
    """phi [B, T] of VESPO (arXiv 2602.10693): a soft bound on the ratio w of the whole sequence, without gradient.

    phi(w) = w^k exp(lambda (1 - w)), so phi(1) = 1, with a k and a lambda for each sign of the advantage;
    w is the product over the tokens of exp(logprob_t - old_t), times `correction` (tokens of the sampling policy).
    """
    log_w = log_ratios(logprobs.detach(), old_logprobs, mask, "token").sum(1, keepdim=True)
    least = math.log(_LEAST)
    if correction is not None:
        log_w = log_w + (correction.log().clamp(least, _BOUND) * mask).sum(1, keepdim=True)
    log_w = log_w.clamp(least, _BOUND)
    good = advantages >= 0
    k = torch.where(good, options.vespo_k_pos, options.vespo_k_neg)
    slope = torch.where(good, options.vespo_lambda_pos, options.vespo_lambda_neg).clamp(min=1e-4)
    return (slope + k * log_w - slope * log_w.exp()).exp()


def _lengths(mask: Tensor) -> Tensor:
    return mask.sum(1, keepdim=True).clamp(min=1)
