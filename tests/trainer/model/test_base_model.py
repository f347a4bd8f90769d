"""Base models that are accepted or rejected, with the message of each rejection."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
)

from agl.config import Config
from agl.errors import ConfigError
from agl_trainer.data.chat import ChatTemplate
from agl_trainer.loop.policy_setup import open_policy
from agl_trainer.model.base_model import check_lengths, check_sampled, check_trainable
from agl_trainer.model.policy import Policy
from agl_trainer.model.tiny import build_tiny_model
from tests.trainer.small_model import small_model, small_policy


def test_a_sliding_window_shorter_than_the_context_is_rejected() -> None:
    check_sampled(MistralConfig(sliding_window=4096), 2048, packs=True)
    with pytest.raises(ConfigError, match=r"mistral.*sliding_window=1024.*kind: vllm"):
        check_sampled(MistralConfig(sliding_window=1024), 2048, packs=True)


def test_a_disabled_sliding_window_is_accepted() -> None:
    check_sampled(Qwen2Config(sliding_window=16, use_sliding_window=False), 2048, packs=True)


def test_softcaps_and_custom_attention_are_rejected_for_sampling() -> None:
    with pytest.raises(ConfigError, match="attn_logit_softcapping"):
        check_sampled(Gemma2Config(), 2048, packs=True)
    with pytest.raises(ConfigError, match="llama model with attention=of its own"):
        check_sampled(LlamaConfig(), 2048, packs=False)


def test_an_unsupported_output_layer_is_rejected() -> None:
    check_trainable(small_model("gemma2"))
    model = small_model()
    model.config.logit_scale = 0.5
    with pytest.raises(ConfigError, match=r"llama model with logit_scale=0.5"):
        check_trainable(model)
    biased = small_model()
    biased.lm_head = torch.nn.Linear(24, 400)
    with pytest.raises(ConfigError, match=r"lm_head.bias"):
        check_trainable(biased)


def opened_policy(train: dict[str, Any]) -> Policy:
    config = Config.parse({"agent_roles": {"solver": {}}, "train": train})
    return open_policy(config, *config.bases())


def test_a_model_without_a_chat_template_needs_one(tmp_path: Path) -> None:
    build_tiny_model(tmp_path / "base", ["a few words"], 0)
    (tmp_path / "base" / "chat_template.jinja").rename(tmp_path / "mine.jinja")
    train = {"model": str(tmp_path / "base"), "output_dir": str(tmp_path)}

    def opened(**options: str) -> Policy:
        return opened_policy(train | options)

    with pytest.raises(ConfigError, match=r"has no chat template.*set train\.chat_template to a Jinja file"):
        opened()
    with pytest.raises(ConfigError, match=r"cannot read .*other\.jinja: No such file"):
        opened(chat_template=str(tmp_path / "other.jinja"))
    policy = opened(chat_template=str(tmp_path / "mine.jinja"))
    assert "<|im_start|>user" in ChatTemplate(policy.tokenizer).prompt_text([{"role": "user", "content": "a"}])
    assert policy.base_name == "base"


def test_a_model_that_transformers_cannot_load_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "of-its-own"}')
    (tmp_path / "model.safetensors").touch()
    train = {"model": str(tmp_path), "output_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"train\.model .*: transformers cannot load"):
        opened_policy(train)


def test_frequencies_that_depend_on_the_length_are_refused_beyond_the_original_context() -> None:
    dynamic = LlamaConfig(max_position_embeddings=32, rope_parameters={"rope_type": "dynamic", "factor": 4.0})
    check_lengths(dynamic, 32)
    with pytest.raises(ConfigError, match=r"llama model with rope_type=dynamic.*max_model_len to at most 32"):
        check_lengths(dynamic, 33)
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 4096}
    small = {"hidden_size": 64, "num_attention_heads": 4}
    long = Phi3Config(rope_parameters={"rope_type": "longrope", **factors}, max_position_embeddings=131072, **small)
    check_lengths(long, 2048)
    with pytest.raises(ConfigError, match=r"phi3 model with rope_type=longrope.*at most 4096"):
        check_lengths(long, 8192)
    check_lengths(Gemma2Config(), 100_000)


def test_a_model_that_peft_cannot_adapt_is_refused_with_its_reason() -> None:
    mamba = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(ConfigError, match=r"mamba model; name other layers in lora_target_modules.*out_proj"):
        small_policy(mamba.requires_grad_(False), packs=False)


@pytest.mark.parametrize("bf16", [False, True])
def test_weights_become_bfloat16_only_if_requested_and_supported_by_the_cpu(bf16: bool, tmp_path: Path) -> None:
    toy = {"agent": "tests.flows.toy_agent:answer", "tasks": "tests.flows.toy_agent:tasks"}
    train = {"model": "tiny", "bf16": bf16, "output_dir": str(tmp_path), **toy}
    policy = opened_policy(train)
    layers = [module for module in policy._body.modules() if isinstance(module, torch.nn.Linear)]
    frozen = {layer.weight.dtype for layer in layers if not layer.weight.requires_grad}
    rounds = bf16 and any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    assert frozen == {torch.bfloat16 if rounds else torch.float32}
