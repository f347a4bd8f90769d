"""The policy: names of roles, saving and loading adapters, versions."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from agl.config import RoleConfig
from agl.errors import ConfigError, TrainingError
from agl_trainer.data.prefix_tree import pack_rows
from agl_trainer.model.attention import PackedPlan
from agl_trainer.model.lora import BASE, AdapterRouting, route_layers
from agl_trainer.model.policy import Policy
from tests.trainer.scripted_sampler import small_tokenizer
from tests.trainer.small_model import ROLES, plain_model, small_model, small_policy

ROW = [5, 6, 7, 8, 9]


def hidden(policy: Policy, adapters: list[str], *rows: list[int]) -> Tensor:
    packed = pack_rows(rows or [ROW])
    with torch.no_grad():
        return policy.hidden_states(packed.token_ids, packed.positions, adapters, PackedPlan(packed))


def test_a_fresh_adapter_answers_as_the_base_model() -> None:
    policy = Policy(small_model(), small_tokenizer(), ROLES, base_name="small", seed=0)
    assert torch.equal(hidden(policy, ["writer"]), hidden(policy, [BASE]))


def test_each_adapter_changes_the_answer_but_not_the_base_model() -> None:
    policy = small_policy()
    found = {name: hidden(policy, [name]) for name in ("writer", BASE, "fixer")}
    for name, states in found.items():
        expected = plain_model(policy, name, small_model())(input_ids=torch.tensor([ROW]), output_hidden_states=True)
        assert torch.allclose(states, expected.hidden_states[-1][0], atol=1e-5)
    assert not torch.allclose(found["writer"], found["fixer"], atol=0.1)


def test_one_pass_may_mix_adapters() -> None:
    policy, other = small_policy(), [1, *ROW]
    mixed = hidden(policy, ["writer"] * 5 + ["fixer"] * 6, ROW, other)
    assert torch.allclose(mixed[:5], hidden(policy, ["writer"]), atol=1e-5)
    assert torch.allclose(mixed[5:], hidden(policy, ["fixer"], other), atol=1e-5)
    mixed = hidden(policy, [BASE] * 5 + ["writer"] * 6, ROW, other)
    assert torch.allclose(mixed[:5], hidden(policy, [BASE]), atol=1e-5)
    assert torch.allclose(mixed[5:], hidden(policy, ["writer"], other), atol=1e-5)


def test_options_of_lora_are_those_of_peft() -> None:
    """Other layers for each role, another scale; sampled by the fused decoder and by the plain one."""
    roles = {
        "writer": RoleConfig(lora_r=4, lora_alpha=8, use_rslora=True, lora_target_modules=["q_proj", "mlp.down_proj"]),
        "fixer": RoleConfig(lora_r=2, lora_alpha=4),
    }
    policy = small_policy(roles=roles)
    assert len(policy.parameters("writer")) == 2 * 2 * 2 and len(policy.parameters("fixer")) == 2 * 2 * 7
    packed = pack_rows([ROW])
    for name in (*roles, BASE):
        model = plain_model(policy, name, small_model())
        expected = model(input_ids=torch.tensor([ROW]), output_hidden_states=True).hidden_states[-1][0]
        with torch.inference_mode():
            sampled = policy.sampled_states(packed.token_ids, packed.positions, [name], PackedPlan(packed))
        assert torch.allclose(hidden(policy, [name]), expected, atol=1e-5)
        assert torch.allclose(sampled, expected, atol=1e-5)
    with pytest.raises(
        ConfigError, match=r"writer.lora_target_modules: 'qkv' is no linear layer of a llama model; .*v_proj"
    ):
        small_policy(roles={"writer": RoleConfig(lora_target_modules=["q_proj", "qkv"])})
    with pytest.raises(ConfigError, match="'lm_head' is no linear layer"):
        small_policy(roles={"writer": RoleConfig(lora_target_modules=["lm_head"])})


def test_inputs_of_adapters_are_dropped_in_passes_with_gradients_only() -> None:
    roles = {
        "writer": RoleConfig(
            lora_r=4, lora_alpha=8, lora_dropout=0.5, lora_target_modules=["layers.0.self_attn.q_proj"]
        )
    }
    policy, plain = (
        small_policy(roles=roles),
        small_policy(roles={"writer": roles["writer"].model_copy(update={"lora_dropout": 0.0})}),
    )
    assert torch.equal(hidden(policy, ["writer"]), hidden(plain, ["writer"]))
    layer = policy._body.layers[0].self_attn.q_proj
    policy._route(["writer"])
    x = torch.ones(4000, 24)
    kept, dropped = plain._body.layers[0].self_attn.q_proj, layer(x)
    plain._route(["writer"])
    assert torch.allclose(dropped.mean(0), kept(x)[0], atol=0.1) and dropped.std(0).min() > 0.01


def test_the_same_seed_gives_the_same_adapters() -> None:
    alone = {"fixer": ROLES["fixer"]}
    one, same, without_writer, other = (
        Policy(small_model(), small_tokenizer(), roles, base_name="small", seed=seed).adapter("fixer")
        for roles, seed in ((ROLES, 1), (ROLES, 1), (alone, 1), (ROLES, 2))
    )
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert all(torch.equal(tensor, without_writer[name]) for name, tensor in one.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("role", ["model", "layers", "weight", "lora_A", "default"])
def test_a_role_may_have_the_name_of_a_part_of_the_model(role: str) -> None:
    policy = small_policy(roles={role: RoleConfig(lora_r=2), "other": RoleConfig(lora_r=2)})
    own, others = policy.parameters(role), policy.parameters("other")
    assert len(own) == len(others) == 28
    assert not set(map(id, own)) & set(map(id, others))
    assert not torch.allclose(hidden(policy, [role]), hidden(policy, ["other"]), atol=0.1)


@pytest.mark.parametrize("role", ["keys", "forward", "a.b", "a@1", "a/b", "", BASE, "small"])
def test_an_invalid_role_name_is_rejected(role: str) -> None:
    with pytest.raises(ConfigError, match=f"agent_roles has a role named '{role}'"):
        small_policy(roles={role: RoleConfig()})


def test_the_error_names_a_layer_that_is_not_linear() -> None:
    model = get_peft_model(small_model(), LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(TrainingError, match=r"layer \S+embed_tokens is a Embedding; only LoRA on linear layers"):
        route_layers(model, AdapterRouting())


def test_an_adapter_is_loaded_with_its_version() -> None:
    policy, other = small_policy(), small_policy(adapter_std=0.5)
    assert policy.version_name("writer") == "writer@0"
    policy.load_adapter("writer", other.adapter("writer"), 7)
    assert [policy.version_name(name) for name in ("writer", "fixer", BASE)] == ["writer@7", "fixer@0", "small@0"]
    assert torch.equal(hidden(policy, ["writer"]), hidden(other, ["writer"]))
    assert all("writer" not in name for name in policy.adapter("writer"))


def test_an_adapter_of_another_shape_is_rejected() -> None:
    policy = small_policy()
    before = hidden(policy, ["writer"])
    with pytest.raises(
        TrainingError, match=r"adapter of role 'writer' does not fit: .* is \(2, 24\), expected \(4, 24\)"
    ):
        policy.load_adapter("writer", policy.adapter("fixer"), 1)
    short = policy.adapter("writer")
    short.pop(next(name for name in short if "layers.1" in name))
    with pytest.raises(TrainingError, match=r"does not fit: \S+layers\.1\S+ is missing"):
        policy.load_adapter("writer", short, 1)
    assert policy.versions["writer"] == 0
    assert torch.equal(hidden(policy, ["writer"]), before)


def test_roles_may_share_an_adapter() -> None:
    roles = {"writer": RoleConfig(lora_r=2), "fixer": RoleConfig(adapter="writer"), "judge": RoleConfig(lora_r=2)}
    policy = small_policy(roles=roles)
    assert policy.adapters == {"writer": ["writer", "fixer"], "judge": ["judge"]}
    assert torch.equal(hidden(policy, ["fixer"]), hidden(policy, ["writer"]))
    assert not torch.allclose(hidden(policy, ["fixer"]), hidden(policy, ["judge"]), atol=0.1)
    assert all(one is other for one, other in zip(policy.parameters("fixer"), policy.parameters("writer"), strict=True))
    assert policy.adapter_config("fixer") == policy.adapter_config("writer")
