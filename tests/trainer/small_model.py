"""Models of a few thousand parameters, policies on them with adapters that matter, and PEFT's own word on both."""

from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from agl.config import RoleConfig
from agl_trainer.model.lora import BASE
from agl_trainer.model.policy import Policy
from tests.trainer.scripted_sampler import small_tokenizer

VOCABULARY = 400
"""As many as the tokens of `small_tokenizer`, or a few more."""
OPTIONS = {
    "mistral": {"sliding_window": 12},
    "gemma2": {"sliding_window": 12, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 12},
    "phi3": {"pad_token_id": 0},
    "smollm3": {"pad_token_id": 0},
}
"""Of families that are more than Llama: windows shorter than rows, caps low enough to matter."""
ROLES = {"writer": RoleConfig(lora_r=4, lora_alpha=8), "fixer": RoleConfig(lora_r=2, lora_alpha=4)}


def small_model(
    family: str = "llama", *, kv_heads: int = 1, dtype: torch.dtype = torch.float32, layers: int = 2
) -> PreTrainedModel:
    """A random model with three heads; always the same for the same arguments.

    Its norms compute in `dtype`: transformers' own round to float32, gradients too, in whatever order they come.
    """
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](
        **OPTIONS.get(family, {}),
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=3,
        num_key_value_heads=kv_heads,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, norm in list(model.named_modules()):
        if name.endswith("norm"):
            model.set_submodule(name, torch.nn.RMSNorm(norm.weight.shape, eps=1e-6))
    return model.to(dtype).eval().requires_grad_(False)


def small_policy(
    model: PreTrainedModel | None = None,
    roles: Mapping[str, RoleConfig] = ROLES,
    *,
    adapter_std: float = 0.2,
    packs: bool = True,
    recomputes: bool = False,
    shards: bool = False,
    compiles: bool = False,
) -> Policy:
    """A policy whose adapters change what the model says (fresh ones do not)."""
    policy = Policy(
        model or small_model(),
        small_tokenizer(),
        roles,
        base_name="small",
        seed=0,
        packs=packs,
        recomputes=recomputes,
        shards=shards,
        compiles=compiles,
    )
    for role in roles:
        for parameter in policy.parameters(role):
            torch.nn.init.normal_(parameter, std=adapter_std)
    return policy


def plain_model(policy: Policy, adapter: str, base: PreTrainedModel) -> PreTrainedModel | PeftModel:
    """`base`, a second copy of the policy's model, with its adapter as PEFT alone loads and runs it."""
    if adapter == BASE:
        return base
    config = LoraConfig(**{**policy.adapter_config(adapter), "inference_mode": False})
    peft = get_peft_model(base, config).eval()
    set_peft_model_state_dict(peft, policy.adapter(adapter))
    return peft


def plain_logits(model: torch.nn.Module, row: Sequence[int]) -> Tensor:
    """Logits [T, V] of one row alone, with transformers' own attention."""
    return model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
