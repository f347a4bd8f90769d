"""Policy losses on tensors [B, T] of the trained tokens. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agl.config import PolicyLossConfig
from agl.errors import TrainingError
from agl_trainer.algo.normalization import is_mean_of_batches, row_weights
from agl_trainer.algo.ratios import (
    high_entropy_threshold,
    log_ratios,
    off_policy_mask,
    sampling_correction,
    vespo_weight,
)
from agl_trainer.algo.trl_options import parse_trl_options


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Inputs of a loss: tensors [B, T] on one device, 0 where `mask` is False."""

    logprobs: Tensor
    """Under the current policy; with gradient."""
    old_logprobs: Tensor
    """Under the policy that is the denominator of the importance ratio."""
    advantages: Tensor
    mask: Tensor
    """bool."""
    ref_logprobs: Tensor | None = None
    """Under the reference policy, for the KL divergence."""
    sampling_logprobs: Tensor | None = None
    """As recorded by the engine, if its policy differs from the old policy."""
    entropies: Tensor | None = None
    """Entropy of the distribution at each token, in nats; with gradient if there is an entropy bonus."""


@dataclass(frozen=True, slots=True)
class StepScale:
    """Constants that all micro-batches of an optimizer step share."""

    weights: Tensor
    """[B]: factor on the token losses of each row."""
    entropy_weight: float = 0.0
    """1 / number of tokens of the step that the entropy bonus averages over."""
    entropy_threshold: float | None = None
    """The policy loss includes only tokens of at least this entropy."""


def policy_loss(
    name: str,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    entropies: Tensor | None = None,
    rollout_ids: Sequence[str] | None = None,
    max_completion_length: int | None = None,
    gradient_accumulation_steps: int = 1,
    **options: Any,
) -> tuple[Tensor, dict[str, float]]:
    """Loss and statistics of a batch that is a whole optimizer step; tensors [B, T] as in `TokenBatch`.

    `name`, `options` and the other parameters are named as in TRL's GRPOConfig, and have its defaults. The option
    `normalization` replaces the loss's own; `rollout_ids`, one per row, default to those of different rollouts, and
    `max_completion_length` to T. `advantages` may also be [B]. Raises TrainingError for an unknown loss or option, an
    invalid value, or tensors of different shapes.
    """
    config = parse_trl_options(name, options)
    batch = _checked(TokenBatch(logprobs, old_logprobs, advantages, mask, ref_logprobs, sampling_logprobs, entropies))
    if batch.entropies is None and config.needs_entropies:
        raise TrainingError("entropy_coef and top_entropy_quantile need entropies")
    scale = _step_scale(config, batch, rollout_ids, max_completion_length or mask.shape[1], gradient_accumulation_steps)
    return token_loss(config, batch, scale)


def token_loss(config: PolicyLossConfig, batch: TokenBatch, scale: StepScale) -> tuple[Tensor, dict[str, float]]:
    """Loss of the tokens of `batch`, a part of an optimizer step, and statistics: means over its tokens.

    l = policy loss * [entropy high enough] * sampling weight + beta * KL,  then the sum of weight_i * l_it over the
    tokens, minus entropy_coef times the mean entropy (arXiv 1602.01783, section 4).
    """
    log_ratio = log_ratios(batch.logprobs, batch.old_logprobs, batch.mask, config.importance_sampling_level)
    losses, stats = _policy_term(config, batch, log_ratio, scale)
    if config.beta != 0:
        divergence = reference_kl(config, batch, log_ratio.exp())
        losses = losses + config.beta * divergence
        stats["kl_ref"] = _mean(divergence, batch.mask)
    loss = (losses * scale.weights.to(losses)[:, None] * batch.mask).sum()
    if config.entropy_coef != 0 and batch.entropies is not None:
        included = batch.mask if scale.entropy_threshold is None else _high_entropy(batch, scale.entropy_threshold)
        loss = loss - config.entropy_coef * scale.entropy_weight * (batch.entropies * included).sum()
    return loss, stats | _ratio_statistics(log_ratio.detach(), batch.mask)


def clipped_loss(config: PolicyLossConfig, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A), and the mask of tokens that the clip left no gradient.

    PPO (arXiv 1707.06347, eq. 7); with two epsilons DAPO (arXiv 2503.14476, eq. 10). `delta` bounds rho in the first
    term, min(rho, delta), which is otherwise unbounded at negative A (INTELLECT-2, arXiv 2505.07291). If it is at least
    1 + epsilon_high, it is the c of dual-clip PPO (arXiv 1912.09729), max(min(rho A, clip(rho) A), c A) at negative A.
    """
    below, above = config.clip_range
    clipped = ratio.clamp(1 - below, 1 + above)
    bounded = ratio if config.delta is None else ratio.clamp(max=config.delta)
    is_clipped = (ratio * advantages > clipped * advantages) | ((bounded < ratio) & (advantages < 0))
    return -torch.minimum(bounded * advantages, clipped * advantages), is_clipped


def cispo_loss(config: PolicyLossConfig, ratio: Tensor, advantages: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """-sg(min(rho, cap)) A logprob, and the mask of capped ratios; every token keeps a gradient.

    CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5); TRL's epsilon_high is the cap itself (ScaleRL, arXiv 2510.13786).
    """
    return -ratio.clamp(max=config.ratio_cap).detach() * advantages * logprobs, ratio > config.ratio_cap


def sapo_loss(config: PolicyLossConfig, ratio: Tensor, advantages: Tensor) -> Tensor:
    """-(4 / tau) sigmoid(tau (rho - 1)) A, with tau by the sign of A: a soft gate instead of the clip.

    SAPO (arXiv 2511.20347); at rho = 1 the slope equals that of rho A.
    """
    tau = torch.where(advantages > 0, config.sapo_temperature_pos, config.sapo_temperature_neg)
    return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages


def reference_kl(config: PolicyLossConfig, batch: TokenBatch, ratio: Tensor) -> Tensor:
    """KL divergence of each token from the reference policy: r - log r - 1 with log r = ref - logprob.

    The k3 estimator (joschu.net/blog/kl-approx.html; GRPO, arXiv 2402.03300, eq. 4), times rho because another policy
    sampled the tokens (`use_bias_correction_kl`; DeepSeek-V3.2, arXiv 2512.02556).
    """
    if batch.ref_logprobs is None:
        raise TrainingError(f"beta is {config.beta}: the KL term needs ref_logprobs")
    log_r = log_ratios(batch.ref_logprobs, batch.logprobs, batch.mask, "token")
    divergence = log_r.exp() - log_r - 1
    return divergence * ratio if config.use_bias_correction_kl else divergence


def _policy_term(
    config: PolicyLossConfig, batch: TokenBatch, log_ratio: Tensor, scale: StepScale
) -> tuple[Tensor, dict[str, float]]:
    """Loss of each token without KL and entropy terms, and statistics of clipping and corrections."""
    stats: dict[str, float] = {}
    correction = None
    if config.importance_sampling_mode is not None:
        if batch.sampling_logprobs is None:
            raise TrainingError(
                f"importance_sampling_mode is {config.importance_sampling_mode}: it needs sampling_logprobs"
            )
        correction, outside = sampling_correction(batch.old_logprobs, batch.sampling_logprobs, batch.mask, config)
        stats |= {"sampling_weight": _mean(correction, batch.mask), "sampling_cut": _mean(outside, batch.mask)}
    losses, clipped = _surrogate(config, batch, log_ratio.exp(), correction)
    stats["clip_fraction"] = _mean(clipped, batch.mask)
    if config.off_policy_mask_threshold is not None:
        sampled_by = batch.old_logprobs if batch.sampling_logprobs is None else batch.sampling_logprobs
        kept = off_policy_mask(
            batch.logprobs, sampled_by, batch.advantages, batch.mask, config.off_policy_mask_threshold
        )
        losses, stats["off_policy_masked"] = losses * kept, _mean(~kept, batch.mask)
    if scale.entropy_threshold is not None:
        losses = losses * _high_entropy(batch, scale.entropy_threshold)
    if correction is not None and config.loss != "vespo":
        losses = losses * correction
    return losses, stats


def _surrogate(
    config: PolicyLossConfig, batch: TokenBatch, ratio: Tensor, correction: Tensor | None
) -> tuple[Tensor, Tensor]:
    match config.loss:
        case "cispo":
            return cispo_loss(config, ratio, batch.advantages, batch.logprobs)
        case "sapo":
            return sapo_loss(config, ratio, batch.advantages), torch.zeros_like(batch.mask)
        case "vespo":
            phi = vespo_weight(batch.logprobs, batch.old_logprobs, batch.advantages, batch.mask, correction, config)
            return -phi * batch.advantages * batch.logprobs, torch.zeros_like(batch.mask)
        case _:
            return clipped_loss(config, ratio, batch.advantages)


def _high_entropy(batch: TokenBatch, threshold: float) -> Tensor:
    assert batch.entropies is not None, "the threshold was computed from entropies"
    return batch.mask & (batch.entropies.detach() >= threshold)


def _step_scale(
    config: PolicyLossConfig,
    batch: TokenBatch,
    rollout_ids: Sequence[str] | None,
    max_completion_length: int,
    accumulation_steps: int,
) -> StepScale:
    """Constants of a step that consists of `accumulation_steps` batches like this one."""
    lengths = batch.mask.sum(1)
    threshold, included = None, batch.mask
    if batch.entropies is not None and config.top_entropy_quantile < 1:
        threshold = high_entropy_threshold(batch.entropies[batch.mask], config.top_entropy_quantile)
        included = _high_entropy(batch, threshold)
    if rollout_ids is None:
        rollout_ids = [str(row) for row in range(len(lengths))]
    weights = row_weights(config.effective_normalization, lengths, rollout_ids, max_completion_length)
    batches = accumulation_steps if is_mean_of_batches(config.effective_normalization) else 1
    return StepScale(weights / batches, 1 / (max(int(included.sum()), 1) * accumulation_steps), threshold)


def _checked(batch: TokenBatch) -> TokenBatch:
    """`batch` with a bool mask, advantages [B, T], and 0 where the mask is False. Raises TrainingError for shapes."""
    shape = batch.logprobs.shape
    advantages = batch.advantages[:, None].expand(shape) if batch.advantages.dim() == 1 else batch.advantages
    given = {
        "logprobs": batch.logprobs,
        "old_logprobs": batch.old_logprobs,
        "advantages": advantages,
        "mask": batch.mask,
        "ref_logprobs": batch.ref_logprobs,
        "sampling_logprobs": batch.sampling_logprobs,
        "entropies": batch.entropies,
    }
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    if len(shape) != 2 or {tensor.shape for tensor in tensors.values()} != {shape}:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise TrainingError(f"expected tensors of one shape [B, T], got {shapes}")
    mask = tensors.pop("mask").bool()
    return TokenBatch(mask=mask, **{name: tensor.masked_fill(~mask, 0.0) for name, tensor in tensors.items()})


def _mean(values: Tensor, mask: Tensor) -> float:
    """Mean over tokens of `values` [B, T] or [B, 1]; a value of a row counts once for each of its tokens."""
    if not mask.any():
        return 0.0
    return values.detach().expand(mask.shape)[mask].cpu().double().mean().item()


def _ratio_statistics(log_ratio: Tensor, mask: Tensor) -> dict[str, float]:
    """Extremes and quantiles of the importance ratio, and `kl` from the old policy by the k3 estimator."""
    log_ratio = log_ratio.expand(mask.shape)[mask].cpu().double()
    if not len(log_ratio):
        return {}
    ratios = log_ratio.exp()
    # torch.quantile is limited to 2^24 values.
    quantiles = torch.quantile(ratios, ratios.new_tensor([0.05, 0.5, 0.95])).tolist() if len(ratios) < 2**24 else []
    return {
        "ratio_max": ratios.max().item(),
        "ratio_min": ratios.min().item(),
        "kl": (ratios - 1 - log_ratio).mean().item(),
        **dict(zip(("ratio_p05", "ratio_p50", "ratio_p95"), quantiles, strict=False)),
    }
