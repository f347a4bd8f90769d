"""Model families: a training step, sampling or the sentence that names vLLM, and the adapter as PEFT loads it."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from agl.errors import ConfigError
from agl_trainer.algo.sft_loss import sft_loss
from agl_trainer.compute.optimizer_step import optimizer_step
from agl_trainer.data.prefix_tree import pack_rows
from agl_trainer.data.rows import TrainingRow
from agl_trainer.engine.local.scheduler import Scheduler
from agl_trainer.model.adapter_files import save_adapter
from agl_trainer.model.attention import PackedPlan
from agl_trainer.model.base_model import check_sampled, check_trainable
from agl_trainer.model.packing_probe import supports_packing
from tests.trainer.small_model import VOCABULARY, plain_logits, small_model, small_policy

ROW = list(range(5, 25))
"""Longer than the windows of `small_model`."""
SAMPLED = {"llama", "qwen2", "qwen3", "phi3", "smollm3", "gpt_neox", "opt"}


def made(family: str) -> PreTrainedModel:
    """Always the same model."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    if family == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=32, **sizes)).eval().requires_grad_(False)
    if family == "opt":
        config = OPTConfig(ffn_dim=32, word_embed_proj_dim=32, **sizes)
        return OPTForCausalLM(config).eval().requires_grad_(False)
    return small_model(family)


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "smollm3", "gpt_neox", "opt"],
)
def test_a_family_trains_samples_and_is_what_peft_loads(family: str, tmp_path: Path) -> None:
    model = made(family)
    check_trainable(model)
    assert supports_packing(model)
    policy = small_policy(model)
    rows = [TrainingRow(ROW, [0] * 4 + [1] * (len(ROW) - 4), 1 / 16), TrainingRow(ROW[:12], [0] * 6 + [1] * 6, 1 / 16)]
    optimizer = torch.optim.AdamW(policy.parameters("writer"), lr=0.01)
    losses = [
        optimizer_step(policy, "writer", optimizer, rows, sft_loss, pack_tokens=64, max_grad_norm=9.0).metrics["loss"]
        for _ in range(8)
    ]
    assert losses[-1] < losses[0]

    save_adapter(tmp_path, policy.adapter("writer"), policy.adapter_config("writer"))
    loaded = PeftModel.from_pretrained(made(family), str(tmp_path)).eval()
    packed = pack_rows([ROW])
    with torch.inference_mode():
        # The engine is refused for models with a window shorter than the context, so its fused decoder has none.
        compute = policy.sampled_states if family in SAMPLED else policy.hidden_states
        hidden = compute(packed.token_ids, packed.positions, ["writer"], PackedPlan(packed))
        found, expected = policy.logits(hidden), plain_logits(loaded, ROW)
    if policy.output_softcap is not None:
        found = policy.output_softcap * torch.tanh(found / policy.output_softcap)
    assert torch.allclose(found, expected, atol=1e-3), (found - expected).abs().max()

    if family in SAMPLED:
        check_sampled(model.config, 256, packs=True)
        with Scheduler(policy, max_batch=2, max_model_len=256):
            pass
    else:
        with pytest.raises(ConfigError, match="kind: vllm"):
            check_sampled(model.config, 256, packs=True)
