"""The loss of an optimizer step of GRPO, evaluated pass by pass."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from agl.config import PolicyLossConfig
from agl_trainer.algo.losses import StepScale, TokenBatch, token_loss
from agl_trainer.algo.ratios import log_ratios
from agl_trainer.data.rows import RowLogprobs, SampledRow

ValuesByRow = Mapping[Hashable, Tensor]
"""Key of a row to a value for each of its trained tokens, [T]."""


@dataclass(frozen=True, slots=True)
class Objective:
    """Maps the logprobs of the rows of a pass to their part of the step's loss, and statistics.

    The denominator of the importance ratio is the recorded logprobs. With a sampling correction, and where the recorded
    ones are NaN, it is the policy at the beginning of the training step; the correction accounts for the recorded
    logprobs (decoupled PPO, arXiv 2110.00641).
    """

    config: PolicyLossConfig
    entropy_weight: float = 0.0
    entropy_threshold: float | None = None
    reference: ValuesByRow | None = None
    """Logprobs of the reference policy."""
    initial: ValuesByRow | None = None
    """Logprobs of the policy at the beginning of the training step; None if this is its first optimizer step."""

    def __call__(self, result: RowLogprobs, rows: Sequence[SampledRow]) -> tuple[Tensor, dict[str, float]]:
        recorded = _recorded(rows, result.logprobs)
        batch = TokenBatch(
            result.logprobs,
            self._old_logprobs(result.logprobs, rows),
            _pad([row.trained(row.advantages) for row in rows], result.logprobs),
            result.mask,
            ref_logprobs=_gather(self.reference, rows, result.logprobs),
            sampling_logprobs=recorded if self._corrects else None,
            entropies=result.entropies,
        )
        weights = result.logprobs.new_tensor([row.weight for row in rows])
        loss, stats = token_loss(self.config, batch, StepScale(weights, self.entropy_weight, self.entropy_threshold))
        advantages = batch.advantages[batch.mask]
        return loss, stats | {"advantage": advantages.mean().item(), "advantage_abs": advantages.abs().mean().item()}

    def ratios(self, rows: Sequence[SampledRow], logprobs: Mapping[tuple[str, ...], Tensor]) -> dict[str, list[float]]:
        """Importance ratios of the tokens of each call that trains, by its span id, as the loss has them.

        `logprobs` [T] are those of the trained tokens of each row, by the span ids of its calls.
        """
        found = {}
        for row in rows:
            current = logprobs[tuple(row.calls)][None]
            mask, level = torch.ones_like(current, dtype=torch.bool), self.config.importance_sampling_level
            log_ratio = log_ratios(current, self._old_logprobs(current, [row]), mask, level)
            values = log_ratio.exp().expand_as(current)[0].tolist()
            for span_id, positions in row.calls.items():
                first = sum(row.loss_mask[: positions.start])
                found[span_id] = values[first : first + len(positions)]
        return found

    @property
    def _corrects(self) -> bool:
        return self.config.importance_sampling_mode is not None

    def _old_logprobs(self, logprobs: Tensor, rows: Sequence[SampledRow]) -> Tensor:
        """The denominator of the importance ratio [B, T]; `logprobs` are those of the current policy."""
        recorded, initial = _recorded(rows, logprobs), _gather(self.initial, rows, logprobs)
        initial = logprobs.detach() if initial is None else initial
        return initial if self._corrects else torch.where(recorded.isnan(), initial, recorded)


def _recorded(rows: Sequence[SampledRow], like: Tensor) -> Tensor:
    return _pad([row.trained(row.logprobs) for row in rows], like)


def _gather(values: ValuesByRow | None, rows: Sequence[SampledRow], like: Tensor) -> Tensor | None:
    """Values of `rows` [B, T], padded with 0, with the dtype and device of `like`."""
    return None if values is None else pad_sequence([values[row.key] for row in rows], batch_first=True).to(like)


def _pad(values: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """[B, T], padded with 0, with the dtype and device of `like`."""
    return pad_sequence([like.new_tensor(row) for row in values], batch_first=True)
