"""A base model in 4 bits: losses and gradients equal those of its dequantized weights."""

import importlib.util
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor
from transformers import PreTrainedModel

from agl.config import Config
from agl.errors import ConfigError
from agl_trainer.compute.logprobs import row_logprobs
from agl_trainer.data.prefix_tree import pack_rows
from agl_trainer.data.rows import TrainingRow
from agl_trainer.loop.policy_setup import open_policy
from agl_trainer.model.attention import PackedPlan
from agl_trainer.model.base_model import load_model
from agl_trainer.model.model_folder import model_folder
from agl_trainer.model.packing_probe import supports_packing
from agl_trainer.model.policy import Policy
from tests.trainer.scripted_sampler import small_tokenizer
from tests.trainer.small_model import small_model, small_policy

ROWS = [TrainingRow([5, 6, 7, 8, last], [0, 0, 1, 1, 1], 0.5) for last in (9, 10)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_model().save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def quantized(folder: Path) -> PreTrainedModel:
    model, _ = load_model(folder, in_4bit=True)
    assert supports_packing(model)  # what a training asks first must leave the weights as they are
    return model


def unpacked(folder: Path) -> PreTrainedModel:
    """A model in float32 with the dequantized weights of `quantized`."""
    model, _ = load_model(folder)
    for name, layer in load_model(folder, in_4bit=True)[0].get_decoder().named_modules():
        if isinstance(layer, torch.nn.Linear):
            weight = dequantize_4bit(layer.weight, layer.weight.quant_state)  # type: ignore[arg-type]  # of bitsandbytes
            model.get_decoder().get_submodule(name).weight.copy_(weight)  # type: ignore[operator]  # typed Module
    return model


def gradient(policy: Policy) -> tuple[Tensor, Tensor]:
    """Logprobs of `ROWS`, and the gradient of their sum in the adapter."""
    result = row_logprobs(policy, "writer", ROWS)
    result.logprobs.sum().backward()
    grads = [parameter.grad for parameter in policy.parameters("writer") if parameter.grad is not None]
    assert len(grads) == 28
    for parameter in policy.parameters("writer"):
        parameter.grad = None
    return result.logprobs.detach(), torch.cat([grad.flatten() for grad in grads])


@pytest.mark.parametrize("recomputes", [False, True])
def test_loss_and_gradient_equal_those_of_the_dequantized_weights(folder: Path, recomputes: bool) -> None:
    policy = small_policy(quantized(folder), recomputes=recomputes)
    expected, expected_gradient = gradient(small_policy(unpacked(folder)))
    logprobs, found = gradient(policy)
    assert torch.allclose(logprobs, expected, atol=1e-5)
    assert torch.allclose(found, expected_gradient, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logprobs, gradient(small_policy(load_model(folder)[0]))[0], atol=1e-3), "nothing was lost"


def test_sampling_agrees_and_gradients_still_flow_afterwards(folder: Path) -> None:
    """The kernel for inference repacks weights; sampling must not leave them repacked."""
    policy = small_policy(quantized(folder))
    _, before = gradient(policy)
    packed = pack_rows([row.token_ids for row in ROWS])
    given = packed.token_ids, packed.positions, ["writer"], PackedPlan(packed)
    with torch.inference_mode():
        sampled = policy.sampled_states(*given)
    assert torch.allclose(policy.hidden_states(*given), sampled, atol=1e-5)
    assert torch.equal(gradient(policy)[1], before)


def test_linear_layers_take_a_seventh_of_the_memory() -> None:
    def size(model: PreTrainedModel) -> int:
        layers = [module for module in model.get_decoder().modules() if isinstance(module, torch.nn.Linear)]
        return sum(layer.weight.nbytes for layer in layers)

    folder = model_folder("smollm2")
    assert size(load_model(folder, in_4bit=True)[0]) * 7 < size(load_model(folder)[0])


def test_a_configuration_enables_it(folder: Path) -> None:
    roles = {"writer": {"lora_r": 4}}
    config = Config.model_validate({"agent_roles": roles, "train": {"model": str(folder), "load_in_4bit": True}})
    policy = open_policy(config, *config.bases(), samples=True)
    assert gradient(policy)[1].abs().max() > 0
    for other in ("bf16", "fsdp"):
        train = {"model": str(folder), "load_in_4bit": True, other: True}
        with pytest.raises(ValueError, match=f"load_in_4bit and {other} exclude each other"):
            Config.model_validate({"agent_roles": roles, "train": train})


def test_the_error_without_bitsandbytes_names_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'agl-trainer\[qlora\]'"):
        load_model(folder, in_4bit=True)
