"""The policy losses: in worked numbers, by what bounds them, and all against the values that TRL computes."""

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from agl.config import LossName, PolicyLossConfig
from agl.errors import TrainingError
from agl_trainer.algo.losses import StepScale, TokenBatch, policy_loss, token_loss
from agl_trainer.algo.normalization import rollout_weights
from agl_trainer.algo.ratios import sampling_correction
from agl_trainer.algo.trl_options import parse_trl_options

TRL: dict[str, Any] = json.loads(Path(__file__).with_name("trl_losses.json").read_text(encoding="utf-8"))
"""Inputs [B, T] in float64, and what the GRPOTrainer of TRL 1.16 makes of them: losses, gradients, sampling weights."""


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
    weights = rollout_weights(mask.sum(1), ["a", "a", "b", "c"])
    assert weights[:3].tolist() == pytest.approx([1 / 18, 1 / 18, 1 / 3])
    zeros = torch.zeros(4, 4)
    assert policy_loss("grpo", zeros, zeros, zeros + 1, mask, rollout_ids=list("aabc"))[0].item() == pytest.approx(
        -2 / 3
    )


def test_a_step_may_be_cut_into_batches() -> None:
    """With the step's weights, losses and gradients of its parts add up to those of the whole."""
    whole = policy_loss("grpo", *inputs(), rollout_ids=list("aabbbc"))[0].item()
    options = PolicyLossConfig()
    logprobs, old, advantages, mask = inputs()
    weights = rollout_weights(mask.sum(1), list("aabbbc"))
    parts = [
        token_loss(options, TokenBatch(*(t[rows] for t in (logprobs, old, advantages, mask))), StepScale(weights[rows]))
        for rows in ([0, 3, 4], [1, 2, 5])
    ]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("name", ["bnpo", "dr_grpo", "dapo", "luspo"])
def test_a_loss_brings_its_normalisation_and_any_other_may_replace_it(name: str) -> None:
    def loss(loss_name: str, **options: Any) -> float:
        return policy_loss(loss_name, *inputs(), rollout_ids=list("aabbbc"), **options)[0].item()

    assert loss(name) == policy_loss(name, *inputs())[0].item() == loss("grpo", normalization=name)
    assert loss(name, normalization="rollout") == loss("grpo") != loss(name)
    assert loss("grpo", normalization="grpo") == policy_loss("grpo", *inputs())[0].item() != loss("grpo")


@pytest.mark.parametrize(
    ("options", "clip_range"),
    [
        ({}, (0.2, 0.2)),
        ({"epsilon_high": 0.28}, (0.2, 0.28)),
        ({"importance_sampling_level": "sequence"}, (3e-4, 4e-4)),
        ({"importance_sampling_level": "sequence", "epsilon": 0.1}, (0.1, 0.1)),
        ({"importance_sampling_level": "sequence", "epsilon_high": 0.1}, (3e-4, 0.1)),
    ],
)
def test_ratios_of_sequences_have_the_clip_range_of_gspo(
    options: dict[str, Any], clip_range: tuple[float, float]
) -> None:
    assert PolicyLossConfig(**options).clip_range == clip_range
    assert PolicyLossConfig(loss="cispo", importance_sampling_level="sequence").ratio_cap == 5.0
    # `policy_loss` has the options of TRL, whose default is 0.2 at both levels.
    assert parse_trl_options("grpo", {"importance_sampling_level": "sequence"}).clip_range == (0.2, 0.2)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (5.0, -2.0, 6.0, 0.0),  # cut at 3: without it the loss is 10, and so is its gradient
        (2.5, -2.0, 5.0, 5.0),
        (5.0, 2.0, -2.4, 0.0),  # the clip has it
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_delta_is_the_dual_clip(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    """max(min(rho A, clip(rho) A), c A) at negative A (arXiv 1912.09729), c = delta = 3."""
    found_loss, found_gradient, stats = one_token(ratio, advantage, delta=3.0)
    clipped = min(max(ratio, 0.8), 1.2) * advantage
    surrogate = min(ratio * advantage, clipped)
    assert found_loss == pytest.approx(-max(surrogate, 3 * advantage) if advantage < 0 else -surrogate)
    assert (found_loss, found_gradient) == (pytest.approx(loss), pytest.approx(gradient))
    assert stats["clip_fraction"] == float(gradient == 0.0)


def test_a_sequence_has_one_ratio() -> None:
    logprobs = torch.tensor([[0.5, 0.1, -0.3], [1.0, 9.0, 9.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    zeros = torch.zeros(2, 3)
    loss, _ = policy_loss("grpo", logprobs, zeros, zeros + 1, mask, importance_sampling_level="sequence", epsilon=9.0)
    loss.backward()
    assert loss.item() == pytest.approx(-(math.exp(0.1) + math.e) / 2)
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx([-math.exp(0.1) / 6] * 3)


@pytest.mark.parametrize("name", get_args(LossName))
def test_on_policy_every_loss_has_the_gradient_of_the_policy(name: str) -> None:
    """-A / T for each token, by whichever constant the loss is divided."""
    logprobs, _, advantages, mask = inputs()
    logprobs.requires_grad_()
    loss, stats = policy_loss(name, logprobs, logprobs.detach(), advantages, mask, normalization="rollout")
    loss.backward()
    lengths = mask.sum(1, keepdim=True)
    assert logprobs.grad is not None
    assert torch.allclose(logprobs.grad, -advantages / (lengths * 6) * mask, rtol=1e-12)
    assert (stats["clip_fraction"], stats["kl"], stats["ratio_p05"]) == (0.0, 0.0, 1.0)


def test_padding_may_hold_anything() -> None:
    logprobs, old, advantages, mask = inputs()
    expected = policy_loss("vespo", logprobs, old, advantages, mask, ref_logprobs=old, beta=0.1)
    bad = [tensor.masked_fill(~mask, math.nan) for tensor in (logprobs, old, advantages)]
    bad[0].requires_grad_()
    loss, stats = policy_loss("vespo", *bad, mask, ref_logprobs=bad[1], beta=0.1)
    loss.backward()
    assert (loss.item(), stats) == (expected[0].item(), expected[1])
    assert bad[0].grad is not None and bad[0].grad.isfinite().all()


@pytest.mark.parametrize("name", get_args(LossName))
def test_a_batch_without_a_token_has_no_loss(name: str) -> None:
    logprobs, old, advantages, mask = inputs()
    loss, stats = policy_loss(name, logprobs, old, advantages, mask & False, entropies=-old, top_entropy_quantile=0.5)
    assert loss.item() == 0.0
    assert stats == {"clip_fraction": 0.0}


@pytest.mark.parametrize("name", get_args(LossName))
def test_nothing_is_made_on_another_device(name: str) -> None:
    """The meta device refuses to be mixed with the CPU, as a GPU does; it holds no values, so none may be asked for."""
    shape = (3, 4)
    made = [torch.zeros(shape, device="meta") for _ in range(5)]
    mask = torch.ones(shape, dtype=torch.bool, device="meta")
    batch = TokenBatch(made[0].requires_grad_(), made[1], made[2], mask, made[3], made[4], made[4])
    options = parse_trl_options(name, {"beta": 0.1, "entropy_coef": 0.1, "off_policy_mask_threshold": 0.1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agl_trainer.algo.losses._mean", lambda values, mask: 0.0 * len(values.expand(mask.shape)))
        patch.setattr("agl_trainer.algo.losses._ratio_statistics", lambda log_ratio, mask: {})
        loss, _ = token_loss(options, batch, StepScale(torch.ones(3, device="meta"), 0.1, 0.5))
    assert loss.device.type == "meta" and loss.shape == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.1}, "beta is 0.1: the KL term needs ref_logprobs"),
        ({"entropy_coef": 0.1}, "need entropies"),
        ({"vllm_importance_sampling_mode": "token_mask"}, "needs sampling_logprobs"),
        ({"vllm_importance_sampling_mode": "tokens"}, "is 'tokens', expected 'token_truncate', 'token_mask'"),
        ({"importance_sampling_level": "word"}, "is 'word', expected 'token' or 'sequence'"),
        ({"top_entropy_quantile": 0}, "is 0, expected greater than 0"),
        ({"normalization": "batch"}, "normalization is 'batch', expected 'rollout', 'grpo', 'bnpo'"),
        ({"loss_type": "dapo"}, "loss option loss_type is not known"),
        ({"epsilon_hihg": 0.1}, "loss option epsilon_hihg is not known; known are beta, delta, .*epsilon_high"),
        ({"rollout_ids": ["a"]}, "got 1 rollout ids for 6 rows"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        policy_loss("grpo", *inputs(), **options)


def test_what_cannot_be_meant_is_refused() -> None:
    zeros, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(TrainingError, match="loss is 'gpro', expected 'grpo', 'bnpo'"):
        policy_loss("gpro", zeros, zeros, zeros, mask)
    with pytest.raises(TrainingError, match=r"one shape \[B, T\], got logprobs \[1, 2\], old_logprobs \[1, 1\]"):
        policy_loss("grpo", zeros, zeros[:, :1], zeros, mask)
    sequence = {"vllm_importance_sampling_mode": "sequence_mask"}
    with pytest.raises(TrainingError, match="vespo weighs sequences itself"):
        policy_loss("vespo", zeros, zeros, zeros, mask, sampling_logprobs=zeros, **sequence)


def as_tensor(name: str) -> Tensor:
    """null is NaN: what the engine did not report."""
    rows = TRL[name] if isinstance(TRL[name][0], list) else [TRL[name]]
    values = [[math.nan if value is None else value for value in row] for row in rows]
    return torch.tensor(values, dtype=torch.float64).squeeze(0)


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logprobs, old ones, advantages and mask [6, 7]."""
    mask = (as_tensor("completion_mask") * as_tensor("tool_mask")).bool()
    return as_tensor("logps"), as_tensor("old_logps"), as_tensor("advantages")[:, None].expand(mask.shape), mask


@pytest.mark.parametrize("case", TRL["loss_cases"], ids=lambda case: case["name"])
def test_loss_and_gradient_are_those_of_trl(case: dict[str, Any]) -> None:
    logprobs, entropies = as_tensor("logps").requires_grad_(), as_tensor("entropies").requires_grad_()
    mask = as_tensor("completion_mask")
    if case["tool_mask"]:
        mask *= as_tensor("tool_mask")
    if case["masked_row"] is not None:
        mask[case["masked_row"]] = 0
    options = dict(case["options"])
    loss, _ = policy_loss(
        options.pop("loss_type"),
        logprobs,
        as_tensor("old_logps") if "old" in case["inputs"] else logprobs.detach(),
        as_tensor("advantages"),
        mask,
        ref_logprobs=as_tensor("ref_logps") if "ref" in case["inputs"] else None,
        sampling_logprobs=as_tensor("sampling_logps") if "sampling" in case["inputs"] else None,
        entropies=entropies if "entropies" in case["inputs"] else None,
        **options,
    )
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-6)
    assert logprobs.grad is not None
    assert (logprobs.grad - torch.tensor(case["gradient"], dtype=torch.float64)).abs().max() < 1e-6
    if "entropy_gradient" in case:
        assert entropies.grad is not None
        assert (entropies.grad - torch.tensor(case["entropy_gradient"], dtype=torch.float64)).abs().max() < 1e-6


@pytest.mark.parametrize("case", TRL["correction_cases"], ids=lambda c: f"{c['mode']}-{c['clip_min']}-{c['clip_max']}")
def test_sampling_weights_are_those_of_trl(case: dict[str, Any]) -> None:
    limits = {f"vllm_importance_sampling_{name}": case[name] for name in ("mode", "clip_max", "clip_min")}
    _, old, _, mask = inputs()
    weights, _ = sampling_correction(old, as_tensor("sampling_logps"), mask, parse_trl_options("grpo", limits))
    assert torch.allclose(weights, torch.tensor(case["ratio"], dtype=torch.float64), rtol=1e-6)  # it works in float32
