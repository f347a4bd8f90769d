"""Verification of adapters by logprobs. The same with real vLLM is in tests/vllm."""

import math

import pytest
import torch
from torch import Tensor

from agl.errors import TrainingError
from agl_trainer.engine.vllm.verification import verify

BASE = -3 + torch.randn(64, generator=torch.Generator().manual_seed(0))
CHANGE = 0.01 * torch.randn(64, generator=torch.Generator().manual_seed(1))
ROUNDING = 0.01 * torch.randn(64, generator=torch.Generator().manual_seed(2))
"""As large as the change, and the same with and without the adapter."""


def check(engine_change: Tensor, trainer_change: Tensor = CHANGE, tolerance: float = 0.05) -> float:
    engine = BASE + ROUNDING + engine_change, BASE + ROUNDING
    return verify("writer@3", engine, (BASE + trainer_change, BASE), tolerance).share


def test_the_same_change_is_accepted_despite_rounding() -> None:
    assert check(CHANGE) == pytest.approx(1, abs=1e-3)


def test_no_change_means_the_base_model() -> None:
    with pytest.raises(TrainingError, match=r"writer@3 is not live.* 0% .*answers as the base model"):
        check(torch.zeros(64))


@pytest.mark.parametrize("factor", [-1.0, 0.4, 2.0])
def test_a_different_change_means_a_different_adapter(factor: float) -> None:
    with pytest.raises(TrainingError, match="another version"):
        check(factor * CHANGE)


def test_another_base_model_exceeds_the_tolerance() -> None:
    with pytest.raises(TrainingError, match=r"nats a token apart.*0\.001"):
        check(CHANGE, tolerance=0.001)


def test_an_adapter_without_effect_is_accepted_before_the_first_update() -> None:
    assert math.isnan(check(torch.zeros(64), torch.zeros(64)))
