"""The loss of an optimizer step over rows: what it looks up beforehand, and that passes do not show in it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from agl.config import PolicyLossConfig
from agl_trainer.algo.objective import Objective
from agl_trainer.compute.logprobs import row_logprobs
from agl_trainer.compute.prefix import ComputedPrefix, PassRunner
from agl_trainer.compute.train_batch import prepare_objective
from agl_trainer.data.passes import plan_passes
from agl_trainer.data.rows import SampledRow
from agl_trainer.model.policy import Policy
from tests.trainer.small_model import small_model, small_policy

PREFIX = list(range(10, 18))


def sampled_rows(policy: Policy, temperature: float | None = None) -> list[SampledRow]:
    """Four rows, on policy: their logprobs are the policy's own, after the temperature where there is one."""
    tokens, mask = [[*PREFIX, 100 + i, i, 7] for i in range(4)], [0] * 8 + [1] * 3
    advantages = [[0.0] * 8 + [value] * 3 for value in (1.0, -1.0, 0.5, -0.5)]
    tempered = None if temperature is None else [temperature] * 11
    rows = [
        SampledRow(t, mask, 1 / 12, [0.0] * 11, a, temperatures=tempered)
        for t, a in zip(tokens, advantages, strict=True)
    ]
    with torch.no_grad():
        found = row_logprobs(policy, "writer", rows).logprobs.tolist()
    return [replace(row, logprobs=[0.0] * 8 + logprobs) for row, logprobs in zip(rows, found, strict=True)]


def run(
    policy: Policy, objective: Objective, rows: Sequence[SampledRow], pack_tokens: int = 4096, entropy: bool = False
) -> tuple[float, Mapping[str, float], torch.Tensor]:
    """Loss, statistics of the last pass, and gradient."""
    loss_sum, stats = 0.0, {}

    def take(part: list[SampledRow], prefix: ComputedPrefix | None) -> None:
        nonlocal loss_sum, stats
        loss, stats = objective(row_logprobs(policy, "writer", part, prefix=prefix, entropy_gradient=entropy), part)
        loss.backward()
        loss_sum += loss.item()

    PassRunner(policy, "writer", take).run_all(plan_passes(rows, pack_tokens))
    grads = [parameter.grad for parameter in policy.parameters("writer") if parameter.grad is not None]
    gradient = torch.cat([grad.flatten() for grad in grads])
    for parameter in policy.parameters("writer"):
        parameter.grad = None
    return loss_sum, stats, gradient


@pytest.mark.parametrize("temperature", [None, 0.5, 1.7])
def test_on_policy_the_ratio_is_one_at_any_temperature(temperature: float | None) -> None:
    policy = small_policy(small_model(dtype=torch.float64))
    rows = sampled_rows(policy, temperature)
    _, stats, _ = run(policy, Objective(PolicyLossConfig()), rows)
    assert [stats[name] for name in ("ratio_min", "ratio_max")] == pytest.approx([1.0, 1.0], abs=1e-12)
    forgotten = [replace(row, temperatures=None if temperature else [0.5] * 11) for row in rows]
    stats = run(policy, Objective(PolicyLossConfig()), forgotten)[1]
    assert stats["ratio_max"] > 1.01 or stats["ratio_min"] < 0.99


@pytest.mark.parametrize(
    "options",
    [
        PolicyLossConfig(beta=0.1),
        PolicyLossConfig(entropy_coef=0.05),
        PolicyLossConfig(top_entropy_quantile=0.4, entropy_coef=0.05),
        PolicyLossConfig(loss="vespo", importance_sampling_mode="token_truncate"),
        PolicyLossConfig(importance_sampling_level="sequence", importance_sampling_mode="sequence_mask"),
    ],
    ids=["kl", "entropy", "top-entropy", "vespo-token", "gspo-sequence"],
)
def test_many_passes_are_as_one(options: PolicyLossConfig) -> None:
    policy = small_policy(small_model(dtype=torch.float64))
    rows = [replace(row, logprobs=[value - 0.1 for value in row.logprobs]) for row in sampled_rows(policy)]
    entropy = options.entropy_coef != 0
    found = []
    for pack_tokens in (4096, 12):
        objective = prepare_objective(policy, "writer", rows, options, pack_tokens=pack_tokens, is_first=False)
        found.append(run(policy, objective, rows, pack_tokens, entropy))
    (one, _, gradient), (other, _, same) = found
    assert one == pytest.approx(other, rel=1e-9)
    assert torch.allclose(gradient, same, rtol=1e-9, atol=1e-12)


def test_the_reference_is_the_model_without_its_adapter() -> None:
    policy, fresh = (
        small_policy(small_model(dtype=torch.float64)),
        small_policy(small_model(dtype=torch.float64), adapter_std=0.0),
    )
    rows = sampled_rows(policy)
    objective = prepare_objective(policy, "writer", rows, PolicyLossConfig(beta=0.1), pack_tokens=4096, is_first=True)
    assert run(policy, objective, rows)[1]["kl_ref"] > 1e-3
    with torch.no_grad():
        base = row_logprobs(fresh, "writer", rows).logprobs
    assert objective.reference is not None
    assert torch.allclose(torch.stack([objective.reference[row.key] for row in rows]), base, rtol=1e-9)


def test_the_reference_may_be_an_earlier_adapter() -> None:
    """Its logprobs are those that it had, also when a different adapter trains; that one is unchanged by the look."""
    policy = small_policy(small_model(dtype=torch.float64))
    rows = sampled_rows(policy)
    start = {name: tensor.clone() for name, tensor in policy.adapter("writer").items()}
    with torch.no_grad():
        for parameter in policy.parameters("writer"):
            parameter *= 1.1
    moved = {name: tensor.clone() for name, tensor in policy.adapter("writer").items()}
    options: dict[str, Any] = {"pack_tokens": 4096, "is_first": True, "reference": start}
    objective = prepare_objective(policy, "writer", rows, PolicyLossConfig(beta=0.1), **options)
    assert objective.reference is not None
    for row in rows:
        assert objective.reference[row.key].tolist() == pytest.approx(row.logprobs[8:], rel=1e-12)
    assert all(torch.equal(tensor, moved[name]) for name, tensor in policy.adapter("writer").items())
    with torch.no_grad():
        now = row_logprobs(policy, "writer", rows).logprobs.flatten().tolist()
    log_r = [then - value for then, value in zip([v for row in rows for v in row.logprobs[8:]], now, strict=True)]
    ratio = [math.exp(-value) for value in log_r]
    divergence = sum((math.exp(a) - 1 - a) * b for a, b in zip(log_r, ratio, strict=True)) / len(log_r)
    assert run(policy, objective, rows)[1]["kl_ref"] == pytest.approx(divergence, rel=1e-9) != 0


@pytest.mark.parametrize("moves", [False, True])
def test_logprobs_that_were_not_recorded_are_those_of_the_policy_as_the_step_began(moves: bool) -> None:
    """An engine with raw logprobs at temperature 0.7: the gradient is that of logprobs after the temperature."""
    policy = small_policy(small_model(dtype=torch.float64))
    exact = sampled_rows(policy, 0.7)
    lacking = [replace(row, logprobs=[0.0] * 8 + [math.nan] * 3) for row in exact]
    objective = prepare_objective(policy, "writer", lacking, PolicyLossConfig(), pack_tokens=4096, is_first=not moves)
    if moves:
        for parameter in policy.parameters("writer"):
            parameter.data *= 1.1
    expected, found = run(policy, Objective(PolicyLossConfig()), exact), run(policy, objective, lacking)
    assert found[0] == pytest.approx(expected[0], rel=1e-9, abs=1e-12)
    assert torch.allclose(found[2], expected[2], rtol=1e-9, atol=1e-12)
    assert found[1]["ratio_max"] == pytest.approx(expected[1]["ratio_max"])


@pytest.mark.parametrize("moves", [False, True])
def test_an_engine_that_samples_otherwise_is_corrected(moves: bool) -> None:
    """Recorded logprobs are 0.2 too high: each token weighs exp(-0.2), and the ratio is to the policy itself."""
    policy = small_policy(small_model(dtype=torch.float64))
    exact = sampled_rows(policy)
    shifted = [replace(row, logprobs=[0.0] * 8 + [value + 0.2 for value in row.logprobs[8:]]) for row in exact]
    options: dict[str, Any] = {"importance_sampling_mode": "token_truncate"}
    objective = prepare_objective(
        policy, "writer", shifted, PolicyLossConfig(**options), pack_tokens=4096, is_first=not moves
    )
    _, stats, gradient = run(policy, objective, shifted)
    assert stats["ratio_max"] == pytest.approx(1.0) and stats["sampling_weight"] == pytest.approx(0.8187307)
    assert torch.allclose(
        gradient, run(policy, Objective(PolicyLossConfig()), exact)[2] * 0.8187307530779818, rtol=1e-9
    )
    if moves:
        for parameter in policy.parameters("writer"):
            parameter.data *= 1.1
        # The ratio is now taken to the policy that the step began with; what the engine did stays as it was.
        _, moved, _ = run(policy, objective, shifted)
        assert moved["sampling_weight"] == stats["sampling_weight"] and moved["ratio_max"] > 1.001
