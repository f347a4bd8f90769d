"""Out of memory: smaller passes, the same step."""

import pytest
import torch
from torch import Tensor

from agl.errors import TrainingError
from agl_trainer.algo.sft_loss import sft_loss
from agl_trainer.compute.memory import fitting_tokens
from agl_trainer.compute.optimizer_step import StepStats, optimizer_step
from agl_trainer.data.prefix_tree import pack_rows
from agl_trainer.data.rows import RowLogprobs
from agl_trainer.model.attention import PackedPlan
from agl_trainer.model.policy import Policy
from tests.trainer.compute.test_optimizer_step import ROWS
from tests.trainer.small_model import small_model, small_policy

ERRORS = [
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 1 bytes"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
]


def step(
    policy: Policy, memory: float, error: Exception, pack_tokens: int | None = 4096
) -> tuple[StepStats, list[Tensor], int]:
    """A step on a machine where a pass of more than `memory` tokens fails; and how often it did."""
    fails = 0

    def loss(result: RowLogprobs, rows: list) -> tuple[Tensor, dict[str, float]]:
        nonlocal fails
        if result.distinct_tokens > memory:
            fails += 1
            raise error
        return sft_loss(result, rows)

    optimizer = torch.optim.SGD(policy.parameters("writer"), lr=0.1)
    update = optimizer_step(policy, "writer", optimizer, ROWS, loss, pack_tokens=pack_tokens, max_grad_norm=1e9)
    return update, [parameter.detach().clone() for parameter in policy.parameters("writer")], fails


@pytest.mark.parametrize("error", ERRORS, ids=["cpu", "gpu", "python"])
def test_passes_become_smaller_and_the_step_stays_the_same(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    whole, parts = (small_policy(small_model(dtype=torch.float64)) for _ in range(2))
    expected, weights, _ = step(whole, 1000, error)
    found, other, fails = step(parts, 30, error, pack_tokens=100)
    assert fails == 2 and parts.pack_limit == 25
    assert "out of memory with passes of 50 tokens; continuing with 25 (train.pack_tokens is 100)" in caplog.text
    assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-12)
    assert all(torch.allclose(one, two, atol=1e-12) for one, two in zip(other, weights, strict=True))
    assert step(parts, 30, error, pack_tokens=100)[2] == 0


def test_a_row_that_does_not_fit_alone_is_named() -> None:
    with pytest.raises(TrainingError, match=r"one row of 23 tokens .*lower engine.max_model_len"):
        step(small_policy(), 10, ERRORS[1])


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        step(small_policy(), 10, RuntimeError("shapes do not fit"))


@pytest.mark.parametrize(
    ("device", "gigabytes", "expected"),
    [("cpu", 24, 1536), ("cpu", 6.2, 1536), ("cpu", 5.8, 768), ("cpu", 1, 192), ("cpu", 0, 96), ("cuda", 80, 8192)],
)
def test_passes_fit_half_of_the_free_memory(
    device: str, gigabytes: float, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    """With the 2 MB per token of SmolLM2 in float32."""
    assert fitting_tokens(device, gigabytes * 1e9, 2_000_000) == expected
    assert len(caplog.records) == (expected < 1536)


def test_passes_are_chosen_once_and_only_without_pack_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy()
    step(policy, 1000, ERRORS[0])
    assert policy.pack_limit is None
    step(policy, 1000, ERRORS[0], pack_tokens=None)
    assert policy.pack_limit == 1536
    monkeypatch.setattr("psutil.virtual_memory", None)
    step(policy, 1000, ERRORS[0], pack_tokens=None)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_the_activations_of_a_token_are_estimated(family: str) -> None:
    """Against the tensors that autograd keeps, without those of attention over few tokens."""
    policy, count = small_policy(small_model(family, layers=3)), 200
    frozen = {parameter.untyped_storage().data_ptr() for parameter in policy._peft.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    packed = pack_rows([[number % 300 for number in range(count)]])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = policy.hidden_states(packed.token_ids, packed.positions, ["writer"], PackedPlan(packed))
    assert hidden.requires_grad
    assert 0.4 < sum(kept.values()) / count / policy.token_bytes < 1
