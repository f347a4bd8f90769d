"""Training steps and forward passes on an accelerator have the results of the CPU."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from agl.config import PolicyLossConfig
from agl_trainer.algo.sft_loss import sft_loss
from agl_trainer.compute.forward import forward_rows
from agl_trainer.compute.optimizer_step import StepStats, optimizer_step
from agl_trainer.compute.train_batch import prepare_objective
from agl_trainer.data.rows import TrainingRow
from agl_trainer.engine.vllm.verification import verify
from agl_trainer.model.lora import BASE
from agl_trainer.model.packing_probe import supports_packing
from agl_trainer.model.policy import Policy
from tests.pretend.accelerator import DEVICE
from tests.trainer.several_devices import rows
from tests.trainer.small_model import ROLES, small_model, small_policy

LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "kl": {"beta": 0.1},
    "entropy": {"entropy_coef": 0.1, "top_entropy_quantile": 0.6},
    "corrected": {"importance_sampling_mode": "sequence_mask", "off_policy_mask_threshold": 3.0, "beta": 0.05},
    "sequence": {"importance_sampling_level": "sequence", "loss": "dapo"},
}
WAYS: dict[str, dict[str, Any]] = {"packed": {}, "padded": {"packs": False}, "recomputed": {"recomputes": True}}


def policies(family: str = "llama", **options: Any) -> list[Policy]:
    """The same policy on the CPU and on the accelerator."""
    return [small_policy(model, **options) for model in (small_model(family), small_model(family).to(DEVICE))]


def take(policy: Policy, role: str, loss: Any, entropy: bool = False) -> StepStats:
    optimizer = torch.optim.SGD(policy.parameters(role), lr=0.1)
    options = {"pack_tokens": 60, "max_grad_norm": 0.5, "entropy_gradient": entropy}
    return optimizer_step(policy, role, optimizer, rows(), loss, **options)


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.device == DEVICE
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-5)


def compare_steps(both: list[Policy], steps: list[StepStats], role: str) -> None:
    on_cpu, on_accelerator = both
    assert steps[1].metrics == pytest.approx(steps[0].metrics, rel=1e-3, abs=1e-5)
    assert_close(on_accelerator.parameters(role), on_cpu.parameters(role))


@pytest.mark.parametrize("way", WAYS)
def test_a_step_of_supervised_fine_tuning(way: str) -> None:
    both = policies(**WAYS[way])
    compare_steps(both, [take(policy, "writer", sft_loss) for policy in both], "writer")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", LOSSES)
def test_steps_of_grpo_with_two_roles(loss: str, way: str) -> None:
    """The second step of each role is off-policy."""
    both, config = policies(**WAYS[way]), PolicyLossConfig(**LOSSES[loss])
    for number in range(2):
        for role in ROLES:
            steps = []
            for policy in both:
                options: dict[str, Any] = {"pack_tokens": 60, "is_first": number == 0}
                objective = prepare_objective(policy, role, rows(), config, **options)
                steps.append(take(policy, role, objective, config.entropy_coef != 0))
            compare_steps(both, steps, role)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mistral"])
def test_other_families(family: str) -> None:
    both = policies(family)
    compare_steps(both, [take(policy, "writer", sft_loss) for policy in both], "writer")


def test_packing_is_probed_there() -> None:
    assert supports_packing(small_model().to(DEVICE))


def test_the_size_of_passes_is_chosen_by_its_memory() -> None:
    policy = policies()[1]
    optimizer_step(
        policy,
        "writer",
        torch.optim.SGD(policy.parameters("writer"), lr=0.1),
        rows(),
        sft_loss,
        pack_tokens=None,
        max_grad_norm=1.0,
    )
    assert policy.pack_limit == 8192


def test_the_proof_that_vllm_serves_an_adapter() -> None:
    """What the engine would report, here the CPU's policy, agrees with the lookups of the trainer."""
    tokens = list(range(3, 40))
    row = TrainingRow(tokens, [0] + [1] * (len(tokens) - 1), 1.0)
    for role in ROLES:
        changes = []
        for policy in policies():
            found, base = (forward_rows(policy, name, [row], len(tokens)).logprobs[row.key] for name in (role, BASE))
            changes.append(found - base)
        verification = verify(f"{role}@1", *changes)
        assert verification.share == pytest.approx(1, abs=1e-3)
