"""One optimizer step of one role's adapter over training rows."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agl_trainer.batch import Row, passes
from agl_trainer.logprobs import RowLogprobs, row_logprobs
from agl_trainer.policy import Policy

logger = logging.getLogger(__name__)

PassLoss = Callable[[RowLogprobs, Sequence[Row]], tuple[Tensor, dict[str, float]]]
"""Loss of the rows of one pass, a sum over their weighted tokens, and statistics that are means over tokens."""


@dataclass(frozen=True, slots=True)
class Update:
    """What a step did: the loss, the gradient norm before clipping, and statistics as means over trained tokens."""

    metrics: dict[str, float]
    distinct_tokens: int
    total_tokens: int

    @property
    def was_skipped(self) -> bool:
        """No optimizer step was taken; of several merged ones, none."""
        return self.metrics["skipped"] == 1


def update_role(
    policy: Policy,
    role: str,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    loss_of: PassLoss[Row],
    *,
    pack_tokens: int,
    max_grad_norm: float,
    entropy_gradient: bool = False,
) -> Update:
    """Take one step on the summed loss of `rows`.

    A gradient that is not finite leaves adapter and optimizer as they were; a warning and `skipped` say so.
    """
    optimizer.zero_grad(set_to_none=True)
    loss_sum, trained, distinct = 0.0, 0, 0
    gathered: dict[str, list[tuple[float, int]]] = {}
    for part in passes(rows, pack_tokens):
        result = row_logprobs(policy, role, part, entropy_gradient=entropy_gradient)
        loss, stats = loss_of(result, part)
        loss.backward()
        loss_sum += loss.item()
        count = int(result.mask.sum())
        entropy = result.entropies.detach()[result.mask].mean().item()
        _gather(gathered, stats | {"entropy": entropy}, count)
        trained, distinct = trained + count, distinct + result.distinct_tokens
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(role), max_grad_norm)
    is_finite = bool(norm.isfinite())
    if is_finite:
        optimizer.step()
    else:
        logger.warning(
            "role %s: the gradient of a step over %d rows is %s (loss %s); the step is skipped, adapter and optimizer "
            "stay as they were",
            role,
            len(rows),
            float(norm),
            loss_sum,
        )
    optimizer.zero_grad(set_to_none=True)
    metrics = {name: _over_passes(name, values) for name, values in gathered.items()}
    metrics |= {"loss": loss_sum, "grad_norm": float(norm), "skipped": float(not is_finite)}
    return Update(metrics, distinct, sum(len(row.token_ids) for row in rows))


def _gather(gathered: dict[str, list[tuple[float, int]]], stats: Mapping[str, float], tokens: int) -> None:
    for name, value in stats.items():
        gathered.setdefault(name, []).append((value, tokens))


def _over_passes(name: str, values: Sequence[tuple[float, int]]) -> float:
    """The statistic `name` over all passes: a mean over tokens, or the extreme that its name ends in."""
    if name.endswith("_max"):
        return max(value for value, _ in values)
    if name.endswith("_min"):
        return min(value for value, _ in values)
    return sum(value * tokens for value, tokens in values) / sum(tokens for _, tokens in values)


def merge_updates(updates: Sequence[Update]) -> Update:
    """Several optimizer steps as one: means of their metrics, sums of their tokens."""
    names = dict.fromkeys(name for update in updates for name in update.metrics)
    metrics = {
        name: _over_passes(name, [(update.metrics[name], 1) for update in updates if name in update.metrics])
        for name in names
    }
    return Update(
        metrics,
        sum(update.distinct_tokens for update in updates),
        sum(update.total_tokens for update in updates),
    )
