"""Recomputed layers: the same gradients with fewer stored tensors."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from agl.errors import ConfigError
from agl_trainer.algo.sft_loss import sft_loss
from agl_trainer.compute.logprobs import row_logprobs
from agl_trainer.compute.prefix import ComputedPrefix, PassRunner
from agl_trainer.data.passes import plan_padded_passes, plan_passes
from agl_trainer.data.prefix_tree import pack_rows
from agl_trainer.model.attention import PackedPlan
from agl_trainer.model.lora import AdapterRouting
from agl_trainer.model.policy import Policy
from agl_trainer.model.recompute import RecomputedLayer, recompute_layers
from tests.trainer.compute.test_prefix import rows
from tests.trainer.model.test_packing_probe import odd_model
from tests.trainer.small_model import ROLES, small_model, small_policy


def gradient(policy: Policy, role: str, pack_tokens: int) -> Tensor:
    """Gradient of all passes over the rows, with passes of other adapters before each backward pass."""

    def run(part: list[Any], prefix: ComputedPrefix | None) -> None:
        loss, _ = sft_loss(row_logprobs(policy, role, part, prefix=prefix), part)
        sample(policy)
        loss.backward()

    parts = plan_passes(rows(), pack_tokens) if policy.packs else plan_padded_passes(rows(), pack_tokens)
    PassRunner(policy, role, run).run_all(parts)
    found = [parameter.grad for parameter in policy.parameters(role) if parameter.grad is not None]
    return torch.cat([grad.flatten() for grad in found])


def sample(policy: Policy) -> Tensor:
    packed = pack_rows([[5, 6, 7]])
    with torch.inference_mode():
        if not policy.packs:
            return policy.padded_states(packed.token_ids, [3], "fixer")
        return policy.hidden_states(packed.token_ids, packed.positions, ["fixer"], PackedPlan(packed))


@pytest.mark.parametrize(
    "pack_tokens", [4096, 250, 130], ids=["one pass", "passes below a prefix", "prefix below prefix"]
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_packed_rows_have_the_same_gradient(family: str, pack_tokens: int) -> None:
    kept, again = (small_policy(small_model(family), recomputes=recomputes) for recomputes in (False, True))
    expected = gradient(kept, "writer", pack_tokens)
    found = gradient(again, "writer", pack_tokens)
    assert expected.norm() > 0
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("make", [small_model, lambda: odd_model("bloom")], ids=["llama", "bloom"])
def test_padded_rows_have_the_same_gradient(make: Any) -> None:
    kept, again = (small_policy(make(), packs=False, recomputes=recomputes) for recomputes in (False, True))
    expected = gradient(kept, "writer", 500)
    found = gradient(again, "writer", 500)
    assert expected.norm() > 0
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_dropped_inputs_are_the_same_in_the_backward_pass() -> None:
    roles = {name: role.model_copy(update={"lora_dropout": 0.5}) for name, role in ROLES.items()}
    kept, again = (small_policy(roles=roles, recomputes=recomputes) for recomputes in (False, True))
    found = []
    for policy in (kept, again, kept):
        for parameter in policy.parameters("writer"):
            parameter.grad = None
        torch.manual_seed(1 if len(found) < 2 else 2)
        found.append(gradient(policy, "writer", 250))
    expected, same, other = found
    assert (same - expected).norm() <= 1e-6 * expected.norm()
    assert (other - expected).norm() > 0.1 * expected.norm()


def kept_bytes(policy: Policy) -> int:
    """Bytes that a forward pass over all rows stores for the backward pass."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    packed = pack_rows([row.token_ids for row in rows()])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = policy.hidden_states(packed.token_ids, packed.positions, ["writer"], PackedPlan(packed))
    assert states.requires_grad
    return sum(sizes.values())


def test_less_is_stored_for_the_backward_pass() -> None:
    kept, again = (small_policy(small_model(layers=6), recomputes=recomputes) for recomputes in (False, True))
    assert kept_bytes(again) < kept_bytes(kept) / 3


def test_sampling_computes_each_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, again = small_policy(), small_policy(recomputes=True)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a layer is checkpointed while sampling")

    monkeypatch.setattr("agl_trainer.model.recompute.checkpoint", refuse)
    assert torch.equal(sample(kept), sample(again))


def test_a_model_without_marked_layers_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"train.gradient_checkpointing: a Linear has no layers"):
        recompute_layers(torch.nn.Linear(2, 2), AdapterRouting(), drops=False)


def layers(model: PreTrainedModel) -> int:
    return sum(isinstance(module.forward, RecomputedLayer) for module in model.modules())


def test_each_layer_is_wrapped_once() -> None:
    model = small_model(layers=3)
    small_policy(model, recomputes=True)
    assert layers(model) == 3
