"""The loss of one optimizer step of a role: what has to be known of all its rows before the first pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from agl_trainer.batch import SampledRow, passes
from agl_trainer.logprobs import RowLogprobs, row_logprobs
from agl_trainer.lora import BASE
from agl_trainer.loss_options import LossOptions
from agl_trainer.losses import StepScale, TokenBatch, token_loss
from agl_trainer.policy import Policy
from agl_trainer.ratios import high_entropy_threshold

OfRow = Mapping[int, Tensor]
"""`id` of a row to values [T] of its trained tokens."""


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
            ref_logprobs=_of_rows(self.reference, rows),
            sampling_logprobs=recorded if corrects else None,
            entropies=result.entropies,
        )
        weights = result.logprobs.new_tensor([row.weight for row in rows])
        loss, stats = token_loss(self.options, batch, StepScale(weights, self.entropy_weight, self.entropy_threshold))
        advantages = batch.advantages[batch.mask]
        return loss, stats | {"advantage": advantages.mean().item(), "advantage_abs": advantages.abs().mean().item()}

    def _old(self, result: RowLogprobs, rows: Sequence[SampledRow]) -> Tensor:
        old = _of_rows(self.began, rows)
        return result.logprobs.detach() if old is None else old


def prepare(
    policy: Policy, role: str, rows: Sequence[SampledRow], options: LossOptions, *, pack_tokens: int, moves: bool
) -> Objective:
    """The objective of a step over `rows`; `moves`: other optimizer steps come between now and this one.

    Takes passes without a gradient where the options ask for what rows do not hold: the reference, all entropies, the
    policy as it is now.
    """
    tokens = sum(sum(row.loss_mask) for row in rows)
    reference = _look(policy, BASE, rows, pack_tokens).logprobs if options.beta != 0 else None
    now = _Values()
    if options.top_entropy_quantile < 1 or (moves and options.vllm_importance_sampling_mode is not None):
        now = _look(policy, role, rows, pack_tokens)
    threshold = None
    if options.top_entropy_quantile < 1:
        entropies = torch.cat(list(now.entropies.values()))
        threshold = high_entropy_threshold(entropies, options.top_entropy_quantile)
        tokens = int((entropies >= threshold).sum())
    began = now.logprobs if moves and options.vllm_importance_sampling_mode is not None else None
    return Objective(options, 1 / max(tokens, 1), threshold, reference, began)


@dataclass(frozen=True, slots=True)
class _Values:
    logprobs: dict[int, Tensor] = field(default_factory=dict)
    entropies: dict[int, Tensor] = field(default_factory=dict)


@torch.no_grad()
def _look(policy: Policy, role: str, rows: Sequence[SampledRow], pack_tokens: int) -> _Values:
    """Logprobs and entropies of the trained tokens of `rows` under `role`."""
    found = _Values()
    for part in passes(rows, pack_tokens):
        result = row_logprobs(policy, role, part)
        for row, logprobs, entropies, mask in zip(part, result.logprobs, result.entropies, result.mask, strict=True):
            found.logprobs[id(row)], found.entropies[id(row)] = logprobs[mask], entropies[mask]
    return found


def _of_rows(values: OfRow | None, rows: Sequence[SampledRow]) -> Tensor | None:
    return None if values is None else pad_sequence([values[id(row)] for row in rows], batch_first=True)


def _padded(values: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """[B, T], 0 where padded, of the type and on the device of `like`."""
    return pad_sequence([like.new_tensor(row) for row in values], batch_first=True)
