"""Logprobs of the trained tokens of packed rows: the output layer only where a loss is taken, in chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agl_trainer.attention import PackedPlan
from agl_trainer.policy import Policy
from agl_trainer.tree import pack_rows

_CHUNK = 256


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """For each row given, the tokens with mask 1: a ragged batch padded to [B, T]."""

    logprobs: Tensor
    """[B, T] float32 (float64 for a float64 model), 0 where padded; carries the gradient."""
    entropies: Tensor
    """[B, T], in nats, of the whole distribution at each token; no gradient."""
    mask: Tensor
    """[B, T] bool."""
    distinct_tokens: int
    """Tokens that were computed."""


def row_logprobs(
    policy: Policy, role: str, rows: Sequence[Sequence[int]], masks: Sequence[Sequence[int]]
) -> RowLogprobs:
    """Logprobs under the adapter of `role` of the tokens of `rows` whose mask is 1; every distinct token runs once.

    Raises ValueError where the first token of a row is masked 1: nothing predicts it.
    """
    if any(mask[0] for mask in masks):
        bad = next(index for index, mask in enumerate(masks) if mask[0])
        raise ValueError(f"row {bad}: its first token has mask 1, but no token before it can predict it")
    packed = pack_rows(rows)
    hidden = policy.hidden_states(packed.token_ids, packed.positions, [role], PackedPlan(packed.segments))
    before = torch.empty_like(packed.token_ids)
    trained_of_row = []
    for index, mask in zip(packed.row_index, masks, strict=True):
        before[index[1:]] = index[:-1]
        trained_of_row.append(index[torch.tensor(mask, dtype=torch.bool)])
    trained = torch.cat(trained_of_row).unique()
    logprobs, entropies = _TokenLogprobs.apply(hidden[before[trained]], policy.output_weight, packed.token_ids[trained])
    places = [torch.searchsorted(trained, index) for index in trained_of_row]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(place) for place in places], batch_first=True).bool()
    place = torch.nn.utils.rnn.pad_sequence(places, batch_first=True)
    return RowLogprobs(logprobs[place] * mask, entropies[place] * mask, mask, len(packed.token_ids))


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(hidden W^T)[target] for hidden [M, H], frozen W [V, H], targets [M].

    No [M, V] tensor is kept: d logprob / d hidden = W[target] - softmax(hidden W^T) W is taken at once, in chunks.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = hidden.new_empty(len(targets), dtype=dtype)
        entropies = torch.empty_like(logprobs)
        slopes = torch.empty_like(hidden)
        for part in torch.arange(len(targets)).split(_CHUNK):
            chunk = slice(int(part[0]), int(part[-1]) + 1)
            log_softmax = (hidden[chunk] @ weight.T).to(dtype).log_softmax(-1)
            logprobs[chunk] = log_softmax.gather(1, targets[chunk, None])[:, 0]
            softmax = log_softmax.exp()
            entropies[chunk] = -torch.linalg.vecdot(softmax, log_softmax)
            slopes[chunk] = weight[targets[chunk]] - softmax.to(weight) @ weight
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return grads[0].to(slopes)[:, None] * slopes, None, None
