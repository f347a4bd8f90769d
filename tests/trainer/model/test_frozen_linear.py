"""Linear layers with frozen weights: same results as torch in every memory layout."""

from types import SimpleNamespace

import pytest
import torch

from agl_trainer.model.cpu.frozen_linear import FrozenLinear


@pytest.mark.parametrize("rows", [1, 7, 32, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("outputs", [40, 1500])
def test_the_packed_product_equals_torchs(rows: int, dtype: torch.dtype, biased: bool, outputs: int) -> None:
    torch.manual_seed(rows)
    weight, x = torch.randn(outputs, 24, dtype=dtype), torch.randn(1, rows, 24, dtype=dtype)
    bias = torch.randn(outputs, dtype=dtype) if biased else None
    product = FrozenLinear(SimpleNamespace(weight=weight, bias=bias))
    expected = torch.nn.functional.linear(x, weight, bias)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.allclose(product(x), expected, atol=1e-5)


def test_gradients_still_flow_after_sampling() -> None:
    """The packed layout has no backward pass, so a pass with gradients must not use it."""
    weight, x = torch.randn(5, 3), torch.randn(2, 3, requires_grad=True)
    product = FrozenLinear(SimpleNamespace(weight=weight))
    with torch.inference_mode():
        product(x)
    product(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, weight.sum(0).expand(2, -1))
