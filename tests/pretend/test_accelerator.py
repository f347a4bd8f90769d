"""The pretend accelerator tells where tensors are."""

import pytest
import torch

from agl_trainer.model.device import best_device
from tests.pretend.accelerator import DEVICE
from tests.trainer.small_model import small_model


def test_it_is_the_device_that_models_are_loaded_to() -> None:
    assert best_device().type == DEVICE.type


def test_a_tensor_on_the_wrong_device_is_an_error() -> None:
    model = small_model().to(DEVICE)
    tokens = torch.arange(5)
    with pytest.raises(RuntimeError, match="expected all tensors on pretend:0, found one on cpu of shape"):
        model(tokens[None])
    assert model(tokens.to(DEVICE)[None]).logits.device == DEVICE
    with pytest.raises(RuntimeError, match="found one on cpu"):
        torch.zeros(3, device=DEVICE).copy_(tokens[:3]).add_(tokens[:3])
    with pytest.raises(TypeError, match="no float64"):
        tokens.to(DEVICE).double()


def test_views_share_their_values() -> None:
    whole = torch.zeros(2, 3, device=DEVICE)
    whole[1].add_(1)
    whole[:, 0] = 5
    assert whole.tolist() == [[5, 0, 0], [5, 1, 1]]
