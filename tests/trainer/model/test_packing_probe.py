"""Models that support packed rows, and training with padded rows for the others."""

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from agl_trainer.algo.sft_loss import sft_loss
from agl_trainer.compute.optimizer_step import optimizer_step
from agl_trainer.model.packing_probe import supports_packing
from tests.trainer.compute.test_optimizer_step import ROWS
from tests.trainer.small_model import small_model, small_policy


def odd_model(family: str) -> PreTrainedModel:
    """A model that mixes tokens without attention, or whose attention depends on distances by other means."""
    torch.manual_seed(0)
    options = {"mamba": {"state_size": 4, "eos_token_id": 0}, "bloom": {"n_head": 3}}[family]
    config = CONFIG_MAPPING[family](
        vocab_size=400, hidden_size=24, num_hidden_layers=2, initializer_range=0.3, **options
    )
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text"])
def test_models_with_standard_attention_support_packing(family: str) -> None:
    model = small_model(family)
    own_attention = model.config._attn_implementation
    assert supports_packing(model)
    assert model.config._attn_implementation == own_attention in ("sdpa", "eager")


@pytest.mark.parametrize("family", ["mamba", "bloom"])
def test_other_models_are_padded_with_a_warning(family: str, caplog: pytest.LogCaptureFixture) -> None:
    assert not supports_packing(odd_model(family))
    assert f"rows of a {family} model are padded instead of packed" in caplog.text


def test_a_model_that_cannot_be_packed_learns_from_padded_rows() -> None:
    policy = small_policy(odd_model("bloom"), packs=False)
    optimizer = torch.optim.AdamW(policy.parameters("writer"), lr=0.02)
    losses = [
        optimizer_step(policy, "writer", optimizer, ROWS, sft_loss, pack_tokens=100, max_grad_norm=1.0).metrics["loss"]
        for _ in range(4)
    ]
    assert losses[-1] < losses[0] - 0.1
