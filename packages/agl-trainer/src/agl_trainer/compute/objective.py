"""The loss of one optimizer step of a role: what has to be known of all its rows before the first pass."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from agl_trainer.algo.losses import StepScale, TokenBatch, token_loss
from agl_trainer.algo.options import LossOptions
from agl_trainer.algo.ratios import high_entropy_threshold
from agl_trainer.compute.lookup import Values, look_up
from agl_trainer.data.rows import RowLogprobs, SampledRow
from agl_trainer.model.lora import BASE
from agl_trainer.model.policy import Policy

OfRow = Mapping[Hashable, Tensor]
"""`key` of a row to values [T] of its trained tokens."""


@dataclass(frozen=True, slots=True)
class Objective:
    """Called with the logprobs of the rows of a pass, it gives their part of the step's loss, and statistics.

    The ratio is taken to the logprobs as recorded. With a sampling correction it is taken to the policy as it was
    when the training step began, and the recorded ones correct for what sampled (decoupled PPO, arXiv 2110.00641).
    """

    options: LossOptions
    entropy_weight: float = 0.0
    entropy_threshold: float | None = None
    reference: OfRow | None = None
    """Logprobs under the base model without an adapter."""
    began: OfRow | None = None
    """Logprobs under the policy when the training step began; None: no optimizer step came between."""

    def __call__(self, result: RowLogprobs, rows: Sequence[SampledRow]) -> tuple[Tensor, dict[str, float]]:
        recorded = _padded([row.trained(row.logprobs) for row in rows], result.logprobs)
        corrects = self.options.vllm_importance_sampling_mode is not None
        batch = TokenBatch(
            result.logprobs,
            self._old(result, rows) if corrects else recorded,
            _padded([row.trained(row.advantages) for row in rows], result.logprobs),
            result.mask,
            ref_logprobs=_of_rows(self.reference, rows, result.logprobs),
            sampling_logprobs=recorded if corrects else None,
            entropies=result.entropies,
        )
        weights = result.logprobs.new_tensor([row.weight for row in rows])
        loss, stats = token_loss(self.options, batch, StepScale(weights, self.entropy_weight, self.entropy_threshold))
        advantages = batch.advantages[batch.mask]
        return loss, stats | {"advantage": advantages.mean().item(), "advantage_abs": advantages.abs().mean().item()}

    def _old(self, result: RowLogprobs, rows: Sequence[SampledRow]) -> Tensor:
        old = _of_rows(self.began, rows, result.logprobs)
        return result.logprobs.detach() if old is None else old


def prepare(
    policy: Policy, role: str, rows: Sequence[SampledRow], options: LossOptions, *, pack_tokens: int, moves: bool
) -> Objective:
    """The objective of a step over `rows`; `moves`: other optimizer steps come between now and this one.

    Takes passes without a gradient where the options ask for what rows do not hold: the reference, all entropies, the
    policy as it is now.
    """
    tokens = sum(sum(row.loss_mask) for row in rows)
    reference = look_up(policy, BASE, rows, pack_tokens).logprobs if options.beta != 0 else None
    now = Values()
    if options.top_entropy_quantile < 1 or (moves and options.vllm_importance_sampling_mode is not None):
        now = look_up(policy, role, rows, pack_tokens)
    threshold = None
    if options.top_entropy_quantile < 1:
        entropies = torch.cat([now.entropies[row.key] for row in rows])
        threshold = high_entropy_threshold(entropies, options.top_entropy_quantile)
        tokens = int((entropies >= threshold).sum())
    began = now.logprobs if moves and options.vllm_importance_sampling_mode is not None else None
    return Objective(options, 1 / max(tokens, 1), threshold, reference, began)


def _of_rows(values: OfRow | None, rows: Sequence[SampledRow], like: Tensor) -> Tensor | None:
    """[B, T], 0 where padded, on the device of `like`."""
    return None if values is None else pad_sequence([values[row.key] for row in rows], batch_first=True).to(like)


def _padded(values: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """[B, T], 0 where padded, of the type and on the device of `like`."""
    return pad_sequence([like.new_tensor(row) for row in values], batch_first=True)
