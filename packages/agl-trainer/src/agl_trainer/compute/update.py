"""One optimizer step of one role's adapter over training rows."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from agl_trainer.compute.gradient import PassLoss, clear, leave_gradient
from agl_trainer.data.rows import Row
from agl_trainer.model.policy import Policy

logger = logging.getLogger(__name__)


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
    gathered = leave_gradient(policy, role, rows, loss_of, pack_tokens=pack_tokens, entropy_gradient=entropy_gradient)
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
            gathered.loss,
        )
    clear(policy, role)
    metrics = {name: _over_passes(name, values) for name, values in gathered.stats.items()}
    metrics |= {"loss": gathered.loss, "grad_norm": float(norm), "skipped": float(not is_finite)}
    return Update(metrics, gathered.distinct, sum(len(row.token_ids) for row in rows))


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
