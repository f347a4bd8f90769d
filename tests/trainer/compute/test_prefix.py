"""PassRunner over a prefix that is computed once give the values and gradients of one pass over everything."""

import random

import pytest
import torch
from torch import Tensor

from agl_trainer.algo.sft_loss import sft_loss
from agl_trainer.compute.logprobs import row_logprobs
from agl_trainer.compute.prefix import ComputedPrefix, PassRunner
from agl_trainer.data.passes import SharedPrefix, plan_passes
from agl_trainer.data.rows import TrainingRow
from agl_trainer.model.policy import Policy
from tests.trainer.small_model import small_model, small_policy


def rows() -> list[TrainingRow]:
    """Two groups with one system prompt, and forks; some shared tokens train, and one row ends inside a prefix."""
    draw = random.Random(4)
    system = draw.choices(range(400), k=40)
    made = []
    for _ in range(2):
        prompt = system + draw.choices(range(400), k=40)
        made += [prompt + draw.choices(range(400), k=k) for k in (9, 3, 12)]
        fork = prompt + draw.choices(range(400), k=35)
        made += [fork, fork + draw.choices(range(400), k=4), fork + draw.choices(range(400), k=20)]
    return [
        TrainingRow(row, [0] + [int(draw.random() < 0.3) for _ in row[2:]] + [1], draw.random() / 50) for row in made
    ]


def step(policy: Policy, pack_tokens: int) -> tuple[float, Tensor, int]:
    """Loss, gradient and computed tokens."""
    loss_sum, distinct = 0.0, 0

    def run(part: list[TrainingRow], prefix: ComputedPrefix | None) -> None:
        nonlocal loss_sum, distinct
        result = row_logprobs(policy, "writer", part, prefix=prefix)
        loss, _ = sft_loss(result, part)
        loss.backward()
        loss_sum, distinct = loss_sum + loss.item(), distinct + result.distinct_tokens

    parts = plan_passes(rows(), pack_tokens)
    assert any(isinstance(part, SharedPrefix) for part in parts) == (pack_tokens < 1000)
    prefix_tokens = PassRunner(policy, "writer", run).run_all(parts)
    grads = [parameter.grad for parameter in policy.parameters("writer") if parameter.grad is not None]
    assert len(grads) == 28
    for parameter in policy.parameters("writer"):
        parameter.grad = None
    return loss_sum, torch.cat([grad.flatten() for grad in grads]), prefix_tokens + distinct


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_shared_prefixes_change_neither_loss_nor_gradient(family: str, dtype: torch.dtype, tolerance: float) -> None:
    policy = small_policy(small_model(family, dtype=dtype))
    loss, gradient, distinct = step(policy, 4096)
    for pack_tokens in (250, 130):
        other_loss, other_gradient, other_distinct = step(policy, pack_tokens)
        assert other_loss == pytest.approx(loss, rel=tolerance)
        assert ((other_gradient - gradient).norm() / gradient.norm()).item() < tolerance
        assert other_distinct == distinct


def logprobs(policy: Policy, pack_tokens: int) -> dict[tuple[int, ...], float]:
    """Sum of the logprobs of each row, without gradient."""
    found: dict[tuple[int, ...], float] = {}

    def run(part: list[TrainingRow], prefix: ComputedPrefix | None) -> None:
        for row, values in zip(part, row_logprobs(policy, "writer", part, prefix=prefix).logprobs, strict=True):
            found[tuple(row.token_ids)] = values.sum().item()

    with torch.no_grad():
        PassRunner(policy, "writer", run).run_all(plan_passes(rows(), pack_tokens))
    return found


def test_without_a_gradient_shared_prefixes_give_the_same_logprobs() -> None:
    policy = small_policy(small_model(dtype=torch.float64))
    assert logprobs(policy, 130) == pytest.approx(logprobs(policy, 4096), rel=1e-12)
