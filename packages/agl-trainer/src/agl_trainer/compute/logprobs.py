"""Logprobs of the trained tokens of packed rows; the output layer runs on these tokens only, in chunks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from agl_trainer.compute.prefix import ComputedPrefix
from agl_trainer.data.prefix_tree import PackedRows, pack_rows, pad_rows
from agl_trainer.data.rows import RowLogprobs, TrainingRow
from agl_trainer.data.truncation import Truncation, is_left_out
from agl_trainer.model.attention import PackedPlan
from agl_trainer.model.device import wide_product
from agl_trainer.model.policy import Policy

_CHUNK = 256
"""Tokens whose logits are in memory at once."""
_LOWEST = -1e4
"""Logit of a token that is left out: its probability is 0, and 0 times its finite logprob is 0."""


def row_logprobs(
    policy: Policy,
    role: str,
    rows: Sequence[TrainingRow],
    *,
    prefix: ComputedPrefix | None = None,
    entropy_gradient: bool = False,
) -> RowLogprobs:
    """Logprobs of the trained tokens of `rows` under the adapter of `role`; every distinct token is computed once.

    Every row begins with the tokens of `prefix`, which are not computed again. Logprobs are those of softmax(logits /
    temperature), with the `temperatures` of the row, among the tokens that its `truncation` keeps. A trained token is
    kept in any case: it was sampled, so only rounding can leave it out. Raises ValueError if rows have different
    truncations, or if the first token of a row has mask 1: no token predicts it.
    """
    truncations = {row.truncation for row in rows} or {Truncation()}
    if len(truncations) > 1:
        raise ValueError(f"the rows of a pass have different truncations: {truncations}")
    if bad := [index for index, row in enumerate(rows) if row.loss_mask[0]]:
        raise ValueError(f"row {bad[0]}: its first token has mask 1, but no token before it can predict it")
    packed = (pack_rows if policy.packs else pad_rows)([row.token_ids for row in rows]).to(policy.device)
    hidden = _hidden_states(policy, role, packed, prefix)
    # Indices and the float64 temperatures stay on the CPU: some accelerators have no float64.
    before = torch.zeros(len(packed.token_ids), dtype=torch.int64)
    trained_of_row, temperatures = [], []
    for index, row in zip(packed.row_index, rows, strict=True):
        before[index[1:]] = index[:-1]
        trained_of_row.append(index[torch.tensor(row.loss_mask, dtype=torch.bool)])
        temperatures += row.trained(row.temperatures) if row.temperatures else [1.0] * len(trained_of_row[-1])
    # A token that several rows share is computed once for each temperature at which it was sampled.
    pairs = torch.stack([torch.cat(trained_of_row).double(), torch.tensor(temperatures, dtype=torch.float64)])
    distinct, index_of = pairs.unique(dim=1, return_inverse=True)
    trained = distinct[0].long()
    logprobs, entropies = TokenLogprobs.apply(
        hidden[before[trained].to(policy.device)],
        policy.output_weight,
        policy.output_softcap,
        packed.token_ids[trained.to(policy.device)],
        distinct[1],
        truncations.pop(),
        entropy_gradient,
    )
    indices = index_of.split([len(index) for index in trained_of_row])
    mask = pad_sequence([torch.ones_like(index) for index in indices], batch_first=True).bool().to(policy.device)
    index = pad_sequence(indices, batch_first=True).to(policy.device)
    computed = len(packed.token_ids) - (prefix.end if prefix else 0)
    return RowLogprobs(logprobs[index] * mask, entropies[index] * mask, mask, computed)


def _hidden_states(policy: Policy, role: str, packed: PackedRows, prefix: ComputedPrefix | None) -> Tensor:
    """Hidden states [N, H] of the packed tokens."""
    if not policy.packs:
        return policy.padded_states(packed.token_ids, [len(index) for index in packed.row_index], role)
    if prefix is None:
        return policy.hidden_states(packed.token_ids, packed.positions, [role], PackedPlan(packed))
    states = prefix.states()
    new = packed.token_ids[prefix.end :]
    if len(new):
        states.append(policy.hidden_states(new, packed.positions[prefix.end :], [role], PackedPlan(packed, prefix)))
    return torch.cat(states)


class TokenLogprobs(torch.autograd.Function):
    """log softmax(z / tau)[target] and the entropy, for hidden [M, H], frozen W [V, H], targets and tau [M].

    The logits are z = hidden W^T, or with a softcap c: c tanh(hidden W^T / c), of slope s = 1 - tanh(hidden W^T / c)^2;
    without softcap s is 1. No [M, V] tensor is kept: the forward pass computes the derivatives in chunks. With p =
    softmax, which is 0 for tokens that the `truncation` leaves out:

        d logprob / d hidden = (s[target] W[target] - (s p) W) / tau
        d entropy / d hidden = -(s p * (log p + entropy)) W / tau      only with `entropy_gradient`

    A pass without gradient skips the derivatives: half of the multiplications.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        softcap: float | None,
        targets: Tensor,
        temperatures: Tensor,
        truncation: Truncation,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = hidden.new_empty(len(targets), dtype=dtype)
        temperatures = temperatures.to(logprobs)
        entropies = torch.empty_like(logprobs)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        entropy_slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] and entropy_gradient else None
        for start in range(0, len(targets), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            target, tau = targets[chunk, None], temperatures[chunk, None]
            logits, slope = _capped(wide_product(hidden[chunk], weight), softcap)
            logits.div_(tau)
            if truncation != Truncation():
                left_out = is_left_out(logits, [truncation] * len(logits)).scatter_(1, target, False)
                logits.masked_fill_(left_out, _LOWEST)
            log_softmax = logits.log_softmax(-1)
            logprobs[chunk] = log_softmax.gather(1, target)[:, 0]
            softmax = log_softmax.exp()
            entropies[chunk] = -torch.linalg.vecdot(softmax, log_softmax)
            if slopes is None:
                continue
            of_target = weight[targets[chunk]]
            if slope is not None:
                of_target = of_target * slope.gather(1, target).to(weight)
            sloped = softmax if slope is None else softmax * slope
            slopes[chunk] = (of_target - sloped.to(weight) @ weight) / tau.to(weight)
            if entropy_slopes is not None:
                surprise = log_softmax.add_(entropies[chunk, None]).mul_(sloped)
                entropy_slopes[chunk] = -(surprise.to(weight) @ weight) / tau.to(weight)
        ctx.save_for_backward(slopes, entropy_slopes)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        slopes, entropy_slopes = ctx.saved_tensors
        grad = grads[0].to(slopes)[:, None] * slopes
        if entropy_slopes is not None:
            grad = grad + grads[1].to(slopes)[:, None] * entropy_slopes
        return grad, None, None, None, None, None, None


def _capped(logits: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Logits after the softcap, in place, and its slope; None: 1 everywhere."""
    if softcap is None:
        return logits, None
    logits.div_(softcap).tanh_()
    slope = 1 - logits.square()
    return logits.mul_(softcap), slope
