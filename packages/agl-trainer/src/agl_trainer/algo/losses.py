"""Policy losses on [B, T] tensors of the trained tokens. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agl.errors import TrainingError
from agl_trainer.algo.normalization import batch_weights, is_mean_of_batches, rollout_weights
from agl_trainer.algo.options import LossOptions
from agl_trainer.algo.ratios import (
    high_entropy_threshold,
    log_ratios,
    off_policy_mask,
    sampling_correction,
    vespo_weight,
)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """What a loss is made of: tensors [B, T] on one device, 0 where `mask` is False."""

    logprobs: Tensor
    """Under the policy that trains; carries the gradient."""
    old_logprobs: Tensor
    """Under the policy that the ratio is taken to."""
    advantages: Tensor
    mask: Tensor
    """bool."""
    ref_logprobs: Tensor | None = None
    """Under the reference, for the KL term."""
    sampling_logprobs: Tensor | None = None
    """As the engine sampled, where that is another policy than the old one."""
    entropies: Tensor | None = None
    """In nats, of the whole distribution at each token; with a gradient where there is an entropy bonus."""


@dataclass(frozen=True, slots=True)
class StepScale:
    """What is the same for all batches of an optimizer step."""

    weights: Tensor
    """[B]: factor on each token loss of a row."""
    entropy_weight: float = 0.0
    """1 / tokens of the step that the entropy bonus is a mean over."""
    entropy_threshold: float | None = None
    """The policy loss is taken only of tokens of at least this entropy."""


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
    **options: Any,
) -> tuple[Tensor, dict[str, float]]:
    """Loss and statistics of a batch that is a whole optimizer step; tensors [B, T] as in `TokenBatch`.

    `name` is the loss and `options` are those of `LossOptions`, both as TRL calls them. With `rollout_ids`, one for
    each row, every rollout weighs the same; without, or with the option `loss_type`, TRL's normalisation counts.
    `advantages` may be [B] too. Raises TrainingError for a name, an option or a shape that cannot be meant.
    """
    asked = LossOptions.parse(name, options)
    batch = _checked(TokenBatch(logprobs, old_logprobs, advantages, mask, ref_logprobs, sampling_logprobs, entropies))
    return token_loss(asked, batch, _scale(asked, batch, rollout_ids))


def token_loss(options: LossOptions, batch: TokenBatch, scale: StepScale) -> tuple[Tensor, dict[str, float]]:
    """The part of an optimizer step's loss that the tokens of `batch` have, and statistics: means over its tokens.

    l = policy loss * [entropy high enough] * sampling weight + beta * KL,  then the sum of weight_i * l_it over the
    tokens, less entropy_coef times the mean entropy (arXiv 1602.01783, section 4).
    """
    log_ratio = log_ratios(batch.logprobs, batch.old_logprobs, batch.mask, options.importance_sampling_level)
    losses, stats = _policy_term(options, batch, log_ratio, scale)
    if options.beta != 0:
        divergence = reference_kl(options, batch, log_ratio.exp())
        losses = losses + options.beta * divergence
        stats["kl_ref"] = _mean(divergence, batch.mask)
    loss = (losses * scale.weights.to(losses)[:, None] * batch.mask).sum()
    if options.entropy_coef != 0 and batch.entropies is not None:
        acting = batch.mask if scale.entropy_threshold is None else _high_entropy(batch, scale.entropy_threshold)
        loss = loss - options.entropy_coef * scale.entropy_weight * (batch.entropies * acting).sum()
    return loss, stats | _ratio_statistics(log_ratio.detach(), batch.mask)


def clipped_loss(options: LossOptions, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A), and where the clip took the gradient away.

    PPO (arXiv 1707.06347, eq. 7); with two epsilons DAPO (arXiv 2503.14476, eq. 10). `delta` bounds rho in the first
    term, which is without bound at negative A (INTELLECT-2, arXiv 2505.07291): min(rho, delta). From 1 + epsilon_high
    on it is the c of dual-clip PPO (arXiv 1912.09729), max(min(rho A, clip(rho) A), c A) at negative A.
    """
    clipped = ratio.clamp(1 - options.epsilon, 1 + options.highest_ratio)
    bounded = ratio if options.delta is None else ratio.clamp(max=options.delta)
    lost = (ratio * advantages > clipped * advantages) | ((bounded < ratio) & (advantages < 0))
    return -torch.minimum(bounded * advantages, clipped * advantages), lost


def cispo_loss(options: LossOptions, ratio: Tensor, advantages: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """-sg(min(rho, epsilon_high)) A logprob, and where the weight was cut: every token keeps its gradient.

    CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5); epsilon_high is the cap itself (ScaleRL, arXiv 2510.13786).
    """
    return -ratio.clamp(max=options.highest_ratio).detach() * advantages * logprobs, ratio > options.highest_ratio


def sapo_loss(options: LossOptions, ratio: Tensor, advantages: Tensor) -> Tensor:
    """-(4 / tau) sigmoid(tau (rho - 1)) A, tau by the sign of A: a soft gate in place of the clip.

    SAPO (arXiv 2511.20347); the slope at rho 1 is that of rho A.
    """
    tau = torch.where(advantages > 0, options.sapo_temperature_pos, options.sapo_temperature_neg)
    return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages


def reference_kl(options: LossOptions, batch: TokenBatch, ratio: Tensor) -> Tensor:
    """KL divergence from the reference, of each token: r - log r - 1 with log r = ref - logprob.

    The k3 estimator (joschu.net/blog/kl-approx.html; GRPO, arXiv 2402.03300, eq. 4), times rho where the tokens are
    another policy's (`use_bias_correction_kl`; DeepSeek-V3.2, arXiv 2512.02556).
    """
    if batch.ref_logprobs is None:
        raise TrainingError(f"beta is {options.beta}: the KL term needs ref_logprobs")
    log_r = log_ratios(batch.ref_logprobs, batch.logprobs, batch.mask, "token")
    divergence = log_r.exp() - log_r - 1
    return divergence * ratio if options.use_bias_correction_kl else divergence


def _policy_term(
    options: LossOptions, batch: TokenBatch, log_ratio: Tensor, scale: StepScale
) -> tuple[Tensor, dict[str, float]]:
    """Loss of each token without KL and entropy, and what was clipped and corrected."""
    stats: dict[str, float] = {}
    correction = None
    if options.vllm_importance_sampling_mode is not None:
        correction, cut = sampling_correction(batch.old_logprobs, _sampling(options, batch), batch.mask, options)
        stats |= {"sampling_weight": _mean(correction, batch.mask), "sampling_cut": _mean(cut, batch.mask)}
    losses, clipped = _surrogate(options, batch, log_ratio.exp(), correction)
    stats["clip_fraction"] = _mean(clipped, batch.mask)
    if options.off_policy_mask_threshold is not None:
        sampled_by = batch.old_logprobs if batch.sampling_logprobs is None else batch.sampling_logprobs
        near = off_policy_mask(
            batch.logprobs, sampled_by, batch.advantages, batch.mask, options.off_policy_mask_threshold
        )
        losses, stats["off_policy_masked"] = losses * near, _mean(~near, batch.mask)
    if scale.entropy_threshold is not None:
        losses = losses * _high_entropy(batch, scale.entropy_threshold)
    if correction is not None and options.name != "vespo":
        losses = losses * correction
    return losses, stats


def _surrogate(
    options: LossOptions, batch: TokenBatch, ratio: Tensor, correction: Tensor | None
) -> tuple[Tensor, Tensor]:
    match options.name:
        case "cispo":
            return cispo_loss(options, ratio, batch.advantages, batch.logprobs)
        case "sapo":
            return sapo_loss(options, ratio, batch.advantages), torch.zeros_like(batch.mask)
        case "vespo":
            phi = vespo_weight(batch.logprobs, batch.old_logprobs, batch.advantages, batch.mask, correction, options)
            return -phi * batch.advantages * batch.logprobs, torch.zeros_like(batch.mask)
        case _:
            return clipped_loss(options, ratio, batch.advantages)


def _sampling(options: LossOptions, batch: TokenBatch) -> Tensor:
    if batch.sampling_logprobs is None:
        raise TrainingError(
            f"vllm_importance_sampling_mode is {options.vllm_importance_sampling_mode}: it needs sampling_logprobs"
        )
    return batch.sampling_logprobs


def _high_entropy(batch: TokenBatch, threshold: float) -> Tensor:
    assert batch.entropies is not None, "a threshold of entropies is taken from entropies"
    return batch.mask & (batch.entropies.detach() >= threshold)


def _scale(options: LossOptions, batch: TokenBatch, rollout_ids: Sequence[str] | None) -> StepScale:
    """That of a batch which is a whole step, or one of `gradient_accumulation_steps`."""
    lengths = batch.mask.sum(1)
    threshold, acting = None, batch.mask
    if batch.entropies is None and options.needs_entropies:
        raise TrainingError("entropy_coef and top_entropy_quantile need entropies")
    if batch.entropies is not None and options.top_entropy_quantile < 1:
        threshold = high_entropy_threshold(batch.entropies[batch.mask], options.top_entropy_quantile)
        acting = _high_entropy(batch, threshold)
    if options.loss_type is None and rollout_ids is not None:
        weights, batches = rollout_weights(lengths, rollout_ids), 1
    else:
        loss_type = options.loss_type or options.name
        weights = batch_weights(loss_type, lengths, options.max_completion_length or batch.mask.shape[1])
        batches = options.gradient_accumulation_steps if is_mean_of_batches(loss_type) else 1
    entropy_weight = 1 / (max(int(acting.sum()), 1) * options.gradient_accumulation_steps)
    return StepScale(weights / batches, entropy_weight, threshold)


def _checked(batch: TokenBatch) -> TokenBatch:
    """`batch` with one shape, a bool mask and nothing where it is False. Raises TrainingError for other shapes."""
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
        said = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise TrainingError(f"expected tensors of one shape [B, T], got {said}")
    mask = tensors.pop("mask").bool()
    return TokenBatch(mask=mask, **{name: tensor.masked_fill(~mask, 0.0) for name, tensor in tensors.items()})


def _mean(values: Tensor, mask: Tensor) -> float:
    """Over the tokens; what there is one of for a row counts for each of its tokens."""
    if not mask.any():
        return 0.0
    return values.detach().expand(mask.shape)[mask].double().mean().item()


def _ratio_statistics(log_ratio: Tensor, mask: Tensor) -> dict[str, float]:
    """`kl`: from the old policy, by the k3 estimator."""
    log_ratio = log_ratio.expand(mask.shape)[mask].double()
    if not len(log_ratio):
        return {}
    ratios = log_ratio.exp()
    marks = torch.quantile(ratios, ratios.new_tensor([0.05, 0.5, 0.95])).tolist() if len(ratios) < 2**24 else []
    return {
        "ratio_max": ratios.max().item(),
        "ratio_min": ratios.min().item(),
        "kl": (ratios - 1 - log_ratio).mean().item(),
        **dict(zip(("ratio_p05", "ratio_p50", "ratio_p95"), marks, strict=False)),
    }
