"""One optimizer step of one role's adapter over training rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agl_trainer.batch import Row, passes
from agl_trainer.logprobs import RowLogprobs, row_logprobs
from agl_trainer.policy import Policy

PassLoss = Callable[[RowLogprobs, Sequence[Row]], tuple[Tensor, dict[str, float]]]
"""Loss of the rows of one pass, a sum over their weighted tokens, and statistics that are means over tokens."""


@dataclass(frozen=True, slots=True)
class Update:
    """What a step did: the loss, the gradient norm before clipping, and statistics as means over trained tokens."""

    metrics: dict[str, float]
    distinct_tokens: int
    total_tokens: int


def update_role(
    policy: Policy,
    role: str,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    loss_of: PassLoss[Row],
    *,
    pack_tokens: int,
    max_grad_norm: float,
) -> Update:
    """Take one step on the summed loss of `rows`.

    A gradient that is not finite leaves the adapter as it was, and `skipped` is 1 in the metrics.
    """
    optimizer.zero_grad(set_to_none=True)
    loss_sum, trained, distinct = 0.0, 0, 0
    sums: dict[str, float] = {}
    for part in passes(rows, pack_tokens):
        result = row_logprobs(policy, role, [row.token_ids for row in part], [row.loss_mask for row in part])
        loss, stats = loss_of(result, part)
        loss.backward()
        loss_sum += loss.item()
        count = int(result.mask.sum())
        for name, value in (stats | {"entropy": result.entropies[result.mask].mean().item()}).items():
            sums[name] = sums.get(name, 0.0) + value * count
        trained, distinct = trained + count, distinct + result.distinct_tokens
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(role), max_grad_norm)
    is_finite = bool(norm.isfinite())
    if is_finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    metrics = {name: value / trained for name, value in sums.items()}
    metrics |= {"loss": loss_sum, "grad_norm": float(norm), "skipped": float(not is_finite)}
    return Update(metrics, distinct, sum(len(row.token_ids) for row in rows))


def merge_updates(updates: Sequence[Update]) -> Update:
    """Several optimizer steps as one: means of their metrics, sums of their tokens."""
    names = dict.fromkeys(name for update in updates for name in update.metrics)
    metrics = {name: sum(update.metrics[name] for update in updates) / len(updates) for name in names}
    return Update(
        metrics,
        sum(update.distinct_tokens for update in updates),
        sum(update.total_tokens for update in updates),
    )
