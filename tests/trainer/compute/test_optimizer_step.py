"""One optimizer step of one role: what moves, by how much, and what leaves everything as it was."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from agl.config import PolicyLossConfig
from agl_trainer.algo.objective import Objective
from agl_trainer.algo.sft_loss import sft_loss
from agl_trainer.compute.logprobs import row_logprobs
from agl_trainer.compute.optimizer_step import PassLoss, StepStats, optimizer_step
from agl_trainer.data.rows import RowLogprobs, SampledRow, TrainingRow
from agl_trainer.model.policy import Policy
from tests.trainer.small_model import small_model, small_policy

PREFIX = list(range(10, 30))
ROWS = [TrainingRow([*PREFIX, 100 + i, i, 7], [0] * 20 + [1, 1, 1], 1 / 24) for i in range(8)]
"""Eight rows of 23 tokens that share 20."""


def state(policy: Policy, role: str) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in policy.parameters(role)]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def step(
    policy: Policy,
    rows: Sequence[Any] = ROWS,
    loss: PassLoss[Any] = sft_loss,
    *,
    pack_tokens: int = 4096,
    **options: Any,
) -> StepStats:
    """One step of plain gradient descent, which shows the gradient itself."""
    optimizer = torch.optim.SGD(policy.parameters("writer"), lr=options.get("lr", 0.1))
    limit = options.get("max_grad_norm", 1e9)
    return optimizer_step(policy, "writer", optimizer, rows, loss, pack_tokens=pack_tokens, max_grad_norm=limit)


def test_a_step_lowers_the_loss_and_moves_one_role_only() -> None:
    policy = small_policy()
    writer, fixer = state(policy, "writer"), state(policy, "fixer")
    base = [parameter.clone() for name, parameter in small_model().named_parameters()]
    losses = [step(policy, lr=0.02).metrics["loss"] for _ in range(5)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.05
    assert not same(state(policy, "writer"), writer)
    assert same(state(policy, "fixer"), fixer)
    assert policy.output_weight.equal(base[0])
    assert all(parameter.grad is None for parameter in policy.parameters("writer"))


def test_the_step_is_the_same_in_one_pass_or_in_many() -> None:
    whole, parts = (small_policy(small_model(dtype=torch.float64)) for _ in range(2))
    one = step(whole)
    other = step(parts, pack_tokens=30)
    assert (one.distinct_tokens, one.total_tokens) == (20 + 8 * 3, 8 * 23)
    assert (other.distinct_tokens, other.total_tokens) == (8 * 3 + 3 * 20, 8 * 23)
    assert one.metrics == pytest.approx(other.metrics, rel=1e-9)
    for left, right in zip(state(whole, "writer"), state(parts, "writer"), strict=True):
        assert torch.allclose(left, right, rtol=1e-9, atol=1e-12)


def test_the_gradient_is_clipped_by_its_norm() -> None:
    free, held = small_policy(), small_policy()
    before = state(free, "writer")
    norm = step(free).metrics["grad_norm"]
    assert step(held, max_grad_norm=norm / 4).metrics["grad_norm"] == pytest.approx(norm)
    for start, far, near in zip(before, state(free, "writer"), state(held, "writer"), strict=True):
        assert torch.allclose((far - start) / 4, near - start, rtol=1e-3, atol=1e-7)


def test_statistics_are_means_over_tokens_not_over_passes() -> None:
    def count(result: RowLogprobs, rows: Sequence[TrainingRow]) -> tuple[Tensor, dict[str, float]]:
        return -result.logprobs.sum(), {"rows": float(len(rows))}

    # PassRunner of 7 rows and of 1: 21 tokens say 7, 3 say 1.
    metrics = step(small_policy(), loss=count, pack_tokens=42).metrics
    assert metrics["rows"] == pytest.approx((21 * 7 + 3 * 1) / 24)
    assert 0 < metrics["entropy"] < 6
    assert metrics["skipped"] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    def spoilt(result: RowLogprobs, rows: Sequence[TrainingRow]) -> tuple[Tensor, dict[str, float]]:
        return sft_loss(result, rows)[0] * bad, {}

    policy = small_policy()
    optimizer = torch.optim.AdamW(policy.parameters("writer"), lr=0.1)
    options: dict[str, Any] = {"pack_tokens": 4096, "max_grad_norm": 1.0}
    optimizer_step(policy, "writer", optimizer, ROWS, sft_loss, **options)
    before, moments = state(policy, "writer"), [value["exp_avg"].clone() for value in optimizer.state.values()]
    update = optimizer_step(policy, "writer", optimizer, ROWS, spoilt, **options)
    assert update.metrics["skipped"] == 1 and update.was_skipped
    assert "role writer: skipped an optimizer step over 8 rows, because the gradient norm is nan" in caplog.text
    assert "adapter and optimizer are unchanged" in caplog.text
    assert same(state(policy, "writer"), before)
    assert same([value["exp_avg"] for value in optimizer.state.values()], moments)
    assert optimizer_step(policy, "writer", optimizer, ROWS, sft_loss, **options).metrics["skipped"] == 0
    assert not same(state(policy, "writer"), before)


def test_grpo_makes_what_did_well_more_likely() -> None:
    policy = small_policy()
    made = [
        SampledRow(row.token_ids, row.loss_mask, 1 / 24, [0.0] * 20 + [-6.0] * 3, [0.0] * 20 + [sign] * 3)
        for row, sign in zip(ROWS, [1.0, -1.0] * 4, strict=True)
    ]

    def logprobs() -> list[float]:
        with torch.no_grad():
            result = row_logprobs(policy, "writer", ROWS)
        return result.logprobs.sum(1).tolist()

    before = logprobs()
    step(policy, made, Objective(PolicyLossConfig(epsilon=1e9)), lr=0.02)
    changes = [after - old for after, old in zip(logprobs(), before, strict=True)]
    assert sum(changes[::2]) > 0 > sum(changes[1::2])
