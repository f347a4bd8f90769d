"""One optimizer step of one role's adapter on training rows."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from agl_trainer.compute.gradient import PassLoss, accumulate_gradient, clear_gradient
from agl_trainer.data.rows import Row
from agl_trainer.model.policy import Policy

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepStats:
    """Loss, gradient norm before clipping, and statistics of an optimizer step as means over trained tokens."""

    metrics: dict[str, float]
    distinct_tokens: int
    """Tokens that were computed."""
    total_tokens: int
    """Tokens of all rows; shared prefixes count once per row."""
    logprobs: Mapping[tuple[str, ...], Tensor] = field(default_factory=dict, compare=False, repr=False)
    """The calls of each row that has any, to the logprobs of its trained tokens before the step; not merged."""

    @property
    def was_skipped(self) -> bool:
        """The optimizer step was not taken; after `merge_stats`, none was."""
        return self.metrics["skipped"] == 1


def optimizer_step(
    policy: Policy,
    role: str,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    loss_fn: PassLoss[Row],
    *,
    pack_tokens: int | None,
    max_grad_norm: float,
    entropy_gradient: bool = False,
) -> StepStats:
    """Take one optimizer step on the summed loss of `rows`.

    If the gradient is not finite, it logs a warning, sets the metric `skipped`, and changes no adapter or optimizer.
    """
    sums = accumulate_gradient(policy, role, rows, loss_fn, pack_tokens=pack_tokens, entropy_gradient=entropy_gradient)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(role), max_grad_norm)
    is_finite = bool(norm.isfinite())
    if is_finite:
        optimizer.step()
    else:
        logger.warning(
            "role %s: skipped an optimizer step over %d rows, because the gradient norm is %s (loss %s); adapter and "
            "optimizer are unchanged",
            role,
            len(rows),
            float(norm),
            sums.loss,
        )
    clear_gradient(policy, role)
    metrics = {name: _aggregate(name, values) for name, values in sums.stats.items()}
    metrics |= {"loss": sums.loss, "grad_norm": float(norm), "skipped": float(not is_finite)}
    return StepStats(metrics, sums.distinct_tokens, sum(len(row.token_ids) for row in rows), sums.logprobs)


def merge_stats(steps: Sequence[StepStats]) -> StepStats:
    """Statistics of several optimizer steps as one: means of their metrics, sums of their tokens."""
    names = dict.fromkeys(name for step in steps for name in step.metrics)
    metrics = {
        name: _aggregate(name, [(step.metrics[name], 1) for step in steps if name in step.metrics]) for name in names
    }
    return StepStats(metrics, sum(step.distinct_tokens for step in steps), sum(step.total_tokens for step in steps))


def _aggregate(name: str, values: Sequence[tuple[float, int]]) -> float:
    """A statistic over several (value, tokens): the maximum or minimum if its name ends so, else the mean by token."""
    if name.endswith("_max"):
        return max(value for value, _ in values)
    if name.endswith("_min"):
        return min(value for value, _ in values)
    return sum(value * tokens for value, tokens in values) / sum(tokens for _, tokens in values)
