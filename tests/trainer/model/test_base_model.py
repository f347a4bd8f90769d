"""Base models that are accepted or rejected, with the message of each rejection."""

from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config

from agl.config import Config
from agl.errors import ConfigError
from agl_trainer.data.chat import ChatTemplate
from agl_trainer.loop.policy_setup import open_policy
from agl_trainer.model.base_model import check_sampled, check_trainable
from agl_trainer.model.policy import Policy
from agl_trainer.model.tiny import build_tiny_model
from tests.trainer.small_model import small_model


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


def test_a_model_without_a_chat_template_needs_one(tmp_path: Path) -> None:
    build_tiny_model(tmp_path / "base", ["a few words"], 0)
    (tmp_path / "base" / "chat_template.jinja").rename(tmp_path / "mine.jinja")
    train = {"model": str(tmp_path / "base"), "output_dir": str(tmp_path)}

    def opened(**options: str) -> Policy:
        return open_policy(Config.parse({"agent_roles": {"solver": {}}, "train": train | options}))

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
        open_policy(Config.parse({"agent_roles": {"solver": {}}, "train": train}))


@pytest.mark.parametrize("bf16", [False, True])
def test_weights_become_bfloat16_only_if_requested_and_supported_by_the_cpu(bf16: bool, tmp_path: Path) -> None:
    toy = {"agent": "tests.flows.toy_agent:answer", "tasks": "tests.flows.toy_agent:tasks"}
    train = {"model": "tiny", "bf16": bf16, "output_dir": str(tmp_path), **toy}
    policy = open_policy(Config.parse({"agent_roles": {"solver": {}}, "train": train}))
    layers = [module for module in policy._body.modules() if isinstance(module, torch.nn.Linear)]
    frozen = {layer.weight.dtype for layer in layers if not layer.weight.requires_grad}
    rounds = bf16 and any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    assert frozen == {torch.bfloat16 if rounds else torch.float32}
