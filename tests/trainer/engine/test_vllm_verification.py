"""Comparison of what an adapter changes in engine and trainer. The same with real vLLM is in tests/vllm."""

import pytest
import torch
from torch import Tensor

from agl.errors import TrainingError
from agl_trainer.engine.vllm.verification import rms, smallest_change, verify

BASE = -3 + torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
CHANGE = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
ROUNDING = CHANGE.square().mean().sqrt() / 8 * torch.randn(40, 4, generator=torch.Generator().manual_seed(2))
"""As large as it may be for a change that is compared."""


def test_a_change_with_rounding_errors_is_the_same() -> None:
    found = verify("writer@3", CHANGE + ROUNDING, CHANGE)
    assert found.share == pytest.approx(1, abs=0.03) and found.cosine == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("served", "reason"),
    [
        (torch.zeros_like(CHANGE), "0% .*answers as the base model"),
        (ROUNDING, "answers as the base model"),
        (-CHANGE, "another version"),
        (CHANGE / 2, "50% .*another version"),
        (2 * CHANGE, "another version"),
        (CHANGE.roll(1, 0), "is not live"),  # as large, in another direction
        (CHANGE + 2 * CHANGE.roll(1, 0), r"cosine of 0\.\d\d.*another version"),  # as large in this direction
        (torch.full_like(CHANGE, torch.nan), "is not live"),
    ],
)
def test_another_change_means_another_adapter(served: Tensor, reason: str) -> None:
    with pytest.raises(TrainingError, match=f"writer@3 is not live.*{reason}" if "live" not in reason else reason):
        verify("writer@3", served, CHANGE)


def test_what_stands_out_is_measured_on_the_base_model() -> None:
    enough = smallest_change("http://one/v1", BASE + ROUNDING, BASE, tolerance=1.0)
    assert enough == pytest.approx(8 * 2**0.5 * rms(ROUNDING))
    with pytest.raises(TrainingError, match=r"base model at http://one/v1 are .* nats a token .*0\.001.*which dtype"):
        smallest_change("http://one/v1", BASE + ROUNDING, BASE, tolerance=0.001)
