"""Normalisation of the loss, as one weight for each row of an optimizer step.

    loss = sum over rows i and trained tokens t of  weight_i * l_it

T_i is the number of trained tokens of row i, B the number of rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from agl.config import Normalization
from agl.errors import TrainingError


def rollout_weights(lengths: Tensor, rollout_ids: Sequence[str]) -> Tensor:
    """1 / (T_r N) for `lengths` [B] in tokens: the T_r tokens of a rollout share its 1/N, of N rollouts in all.

    GRPO's mean of means (arXiv 2402.03300, eq. 3) over rollouts instead of responses. Raises TrainingError if the
    numbers of ids and rows differ.
    """
    if len(lengths) != len(rollout_ids):
        raise TrainingError(f"got {len(rollout_ids)} rollout ids for {len(lengths)} rows")
    index = {rollout_id: number for number, rollout_id in enumerate(dict.fromkeys(rollout_ids))}
    rollout_of_row = torch.tensor([index[rollout_id] for rollout_id in rollout_ids], device=lengths.device)
    tokens = torch.zeros(len(index), dtype=torch.float64, device=lengths.device)
    tokens.index_add_(0, rollout_of_row, lengths.double())
    return 1 / (tokens[rollout_of_row].clamp(min=1) * len(index))


def row_weights(
    normalization: Normalization,
    lengths: Tensor,
    rollout_ids: Sequence[str],
    max_completion_length: int,
    represented: Tensor | None = None,
) -> Tensor:
    """Weights [B] of rows of `lengths` [B] in tokens.

    rollout: see `rollout_weights`. The others are those that TRL gives the losses of these names:
    grpo, sapo: 1 / (T_i B), a mean over rows of means over tokens (arXiv 2402.03300, eq. 3).
    bnpo, dapo, cispo, vespo: 1 / sum of T, a mean over tokens (DAPO, arXiv 2503.14476, eq. 8).
    dr_grpo: 1 / (B L) with the constant length L = `max_completion_length` (arXiv 2503.20783, section 3.2).
    luspo: 1 / B, a mean over rows of sums over tokens (arXiv 2602.05261).

    `represented` [B]: how many rows each stands for, with a mean of 1 over all rows that can be drawn, not over these:
    so the expected loss is that of all rows. A mean over tokens counts the tokens of all that its rows stand for.
    """
    lengths, rows = lengths.double(), len(lengths)
    shares = torch.ones_like(lengths) if represented is None else represented
    if normalization == "rollout":
        return shares * rollout_weights(lengths, rollout_ids)
    if normalization in ("grpo", "sapo"):
        return shares / (lengths.clamp(min=1) * rows)
    if normalization == "dr_grpo":
        return shares / (rows * max_completion_length)
    if normalization == "luspo":
        return shares / rows
    tokens = (shares * lengths).sum()
    return shares / torch.where(tokens > 0, tokens, 1.0)


def is_mean_of_batches(normalization: Normalization) -> bool:
    """Whether the loss of an optimizer step is the mean over its batches; otherwise it is their sum."""
    return normalization not in ("dapo", "cispo", "vespo")
