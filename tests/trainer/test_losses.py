"""The policy loss: in worked numbers, by its clip on both sides, and against the values that TRL computes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agl.errors import TrainingError
from agl_trainer.losses import policy_loss, rollout_weights

TRL: dict[str, Any] = json.loads(Path(__file__).with_name("trl_grpo.json").read_text(encoding="utf-8"))
"""Inputs [B, T] in float64, and loss and gradient of TRL's GRPOTrainer on them."""


def one_token(ratio: float, advantage: float, **options: float) -> tuple[float, float, dict[str, float]]:
    """Loss, gradient with respect to the logprob, and statistics of a single token."""
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    shape = torch.zeros_like(logprobs)
    mask = torch.ones_like(shape, dtype=torch.bool)
    loss, stats = policy_loss("grpo", logprobs, shape, shape + advantage, mask, **options)  # type: ignore[arg-type]
    loss.backward()
    assert logprobs.grad is not None
    return loss.item(), logprobs.grad.item(), stats


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.3, 2.0, -2.4, 0.0),  # clipped above: the token is likely enough already
        (0.7, 2.0, -1.4, -1.4),  # not clipped: it became less likely, against its advantage
        (0.7, -2.0, 1.6, 0.0),  # clipped below
        (1.3, -2.0, 2.6, 2.6),  # not clipped
    ],
)
def test_the_clip_works_on_both_sides(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    found_loss, found_gradient, stats = one_token(ratio, advantage)
    assert found_loss == pytest.approx(loss)
    assert found_gradient == pytest.approx(gradient)
    assert stats["clip_fraction"] == float(gradient == 0.0)


def test_the_upper_bound_may_be_its_own() -> None:
    assert one_token(1.3, 2.0, epsilon_high=0.4)[0] == pytest.approx(-2.6)
    assert one_token(1.5, 2.0, epsilon_high=0.4)[0] == pytest.approx(-2.8)
    assert one_token(0.7, -2.0, epsilon_high=0.4)[0] == pytest.approx(1.6)


@pytest.mark.parametrize(("ratio", "kl"), [(1.0, 0.0), (2.0, 1 - math.log(2)), (0.5, math.log(2) - 0.5)])
def test_statistics_of_the_ratio(ratio: float, kl: float) -> None:
    stats = one_token(ratio, 1.0)[2]
    assert stats["kl"] == pytest.approx(kl)
    assert stats["ratio_max"] == stats["ratio_min"] == pytest.approx(ratio)


def test_a_ratio_that_overflows_stays_finite() -> None:
    logprobs = torch.tensor([[90.0]], requires_grad=True)  # exp(90) is infinite in float32
    zero = torch.zeros(1, 1)
    loss, stats = policy_loss("grpo", logprobs, zero, zero - 1.0, torch.ones(1, 1, dtype=torch.bool))
    loss.backward()
    assert logprobs.grad is not None
    assert all(map(math.isfinite, (loss.item(), logprobs.grad.item(), *stats.values())))


def test_what_is_masked_counts_nowhere() -> None:
    logprobs = torch.tensor([[0.1, -9.0], [0.2, 0.3]], requires_grad=True)
    old, advantages = torch.zeros(2, 2), torch.ones(2, 2)
    mask = torch.tensor([[True, False], [True, True]])
    loss, stats = policy_loss("grpo", logprobs, old, advantages, mask, epsilon=10.0)
    loss.backward()
    first, second, third = (math.exp(x) for x in (0.1, 0.2, 0.3))
    assert loss.item() == pytest.approx(-(first / 2 + (second + third) / 4))
    assert logprobs.grad is not None and logprobs.grad[0, 1] == 0
    assert stats["ratio_min"] == pytest.approx(first)


def test_every_rollout_weighs_the_same_however_many_rows_and_tokens() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    weights = rollout_weights(mask, ["a", "a", "b", "c"])
    assert weights[:, 0].tolist() == pytest.approx([1 / 18, 1 / 18, 1 / 3, 0.0])
    assert torch.equal(weights, weights[:, :1].expand(4, 4))


def test_weights_of_the_caller_are_taken_as_they_are() -> None:
    zeros, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    loss, _ = policy_loss("grpo", zeros, zeros, zeros + 3, mask, weights=torch.tensor([[0.5, 2.0]]))
    assert loss.item() == pytest.approx(-7.5)


def test_what_cannot_be_meant_is_refused() -> None:
    zeros, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(TrainingError, match="loss 'gpro' is not known; expected grpo"):
        policy_loss("gpro", zeros, zeros, zeros, mask)
    with pytest.raises(TrainingError, match=r"differ in shape: \[\(1, 1\), \(1, 2\)\]"):
        policy_loss("grpo", zeros, zeros[:, :1], zeros, mask)


def as_tensor(name: str) -> Tensor:
    return torch.tensor(TRL[name], dtype=torch.float64)


@pytest.mark.parametrize("case", TRL["cases"], ids=lambda case: case["name"])
def test_loss_and_gradient_are_those_of_trl(case: dict[str, Any]) -> None:
    logprobs = as_tensor("logps").requires_grad_()
    old = as_tensor("old_logps") if case["uses_old"] else logprobs.detach()
    mask = as_tensor("completion_mask")
    if case["uses_tool_mask"]:
        mask *= as_tensor("tool_mask")
    if case["masked_row"] is not None:
        mask[case["masked_row"]] = 0
    advantages = as_tensor("advantages")[:, None].expand(mask.shape)
    loss, _ = policy_loss("grpo", logprobs, old, advantages, mask.bool(), **case["options"])
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-7)
    assert logprobs.grad is not None
    assert (logprobs.grad - torch.tensor(case["gradient"], dtype=torch.float64)).abs().max() < 1e-7
