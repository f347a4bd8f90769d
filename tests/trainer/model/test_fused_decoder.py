"""The fused decoder computes what transformers computes, for each model family and each adapter."""

import pytest
import torch
from torch import Tensor

from agl_trainer.data.prefix_tree import pack_rows
from agl_trainer.model.attention import PackedPlan
from agl_trainer.model.base_model import use_bfloat16_products
from agl_trainer.model.cpu.fused_decoder import can_be_fused
from agl_trainer.model.lora import BASE
from agl_trainer.model.policy import Policy
from tests.trainer.small_model import small_model, small_policy

ROWS = [[5, 6, 7, 8, 9], [5, 6, 7, 1, 2, 3], [4, 4, 4]]
ADAPTERS = {
    "one": ["writer"],
    "none": [BASE],
    "each its own": ["writer"] * 4 + [BASE] * 3 + ["fixer"] * 4,
}


def both(policy: Policy, adapters: list[str]) -> tuple[Tensor, Tensor]:
    """Hidden states of transformers' modules, and of sampling."""
    packed = pack_rows(ROWS)
    given = packed.token_ids, packed.positions, adapters, PackedPlan(packed)
    with torch.no_grad():
        expected = policy.hidden_states(*given)
    with torch.inference_mode():
        return expected, policy.sampled_states(*given).clone()


@pytest.mark.parametrize("adapters", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_fused_decoder_equals_its_modules(family: str, adapters: list[str]) -> None:
    model = small_model(family)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", ".bias")):  # ones and zeros in a new model, which hide what is left out
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    assert can_be_fused(model.get_decoder())
    expected, found = both(small_policy(model), adapters)
    assert torch.allclose(found, expected, atol=1e-4), (found - expected).abs().max()


def test_an_updated_adapter_is_used_immediately() -> None:
    policy = small_policy()
    before, _ = both(policy, ["writer"])
    for parameter in policy.parameters("writer"):
        parameter.data.mul_(1.5)
    expected, found = both(policy, ["writer"])
    assert not torch.allclose(before, expected, atol=0.01)
    assert torch.allclose(found, expected, atol=1e-4)


def test_bfloat16_products_round_like_those_of_the_modules() -> None:
    model = small_model()
    use_bfloat16_products(model)
    expected, found = both(small_policy(model), ["writer"])
    assert torch.allclose(found, expected, atol=0.2)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_an_unknown_decoder_is_not_fused(family: str) -> None:
    policy = small_policy(small_model(family))
    assert not can_be_fused(small_model(family).get_decoder())
    expected, found = both(policy, ["writer"])
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_model_in_double_precision_is_not_fused() -> None:
    assert not can_be_fused(small_model(dtype=torch.float64).get_decoder())
