"""Loads the base model, and checks that it can be trained and sampled."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agl.errors import ConfigError
from agl_trainer.model.model_folder import load_pretrained

if TYPE_CHECKING:
    import torch
    from torch.nn import Module
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_UNTRAINABLE = ("logit_scale", "logits_scaling")
"""Keys of a model's configuration that the trainer does not implement."""
_LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Kinds of rotary embeddings whose frequencies change once a sequence is longer than the original context."""
_UNSAMPLED = ("attn_logit_softcapping", "final_logit_softcapping")
"""Keys of a model's configuration that the in-process engine does not implement."""


def check_trainable(model: "PreTrainedModel") -> None:
    """Raises ConfigError if the output layer of `model` does more than a matrix product and a softcap."""
    used = _used(model.config, _UNTRAINABLE)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        used["lm_head.bias"] = True
    if used:
        raise _unsupported(model.config, used, "choose one with a plain output layer, as Llama, Qwen and Gemma have")


def check_sampled(config: "PretrainedConfig", longest: int, *, packs: bool) -> None:
    """Raises ConfigError if the in-process engine cannot run `longest` tokens; `packs` is from `supports_packing`."""
    used = _used(config, _UNSAMPLED)
    window = getattr(config, "sliding_window", None)
    if window and window < longest and getattr(config, "use_sliding_window", True):
        used["sliding_window"] = window
    if not packs:
        used["attention"] = "of its own"
    if used:
        advice = "the in-process engine cannot sample from it: set `engine: {kind: vllm}`, or choose another model"
        raise _unsupported(config, used, advice)


def check_lengths(config: "PretrainedConfig", longest: int) -> None:
    """Raises ConfigError if the rotary frequencies of a token depend on tokens after it, within `longest` tokens.

    Engine and trainer compute tokens in passes of different lengths, and would disagree.
    """
    given = getattr(config, "rope_parameters", None) or {}
    for rope in (given, *(value for value in given.values() if isinstance(value, dict))):
        limit = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", longest)
        if rope.get("rope_type") in _LENGTH_DEPENDENT and longest > limit:
            advice = f"set engine.max_model_len to at most {limit}, or choose another model"
            raise _unsupported(config, {"rope_type": rope["rope_type"], "engine.max_model_len": longest}, advice)


def _used(config: "PretrainedConfig", names: tuple[str, ...]) -> dict[str, object]:
    return {name: value for name in names if (value := getattr(config, name, None))}


def _unsupported(config: "PretrainedConfig", used: dict[str, object], advice: str) -> ConfigError:
    listed = ", ".join(f"{name}={value}" for name, value in used.items())
    return ConfigError(f"a {config.model_type} model with {listed} is not supported here; {advice}")


def decoder_layers(body: "Module", option: str) -> "Sequence[Module]":
    """Layers of the decoder `body`. Raises ConfigError, which names `train.<option>`, if transformers marks none."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in body.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"train.{option}: a {type(body).__name__} has no layers that transformers marks as such; leave it out, or "
            "choose another model"
        )
    return layers


def load_model(
    folder: Path, device: "torch.device | None" = None, *, on_cpu: bool = False, in_4bit: bool = False
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The frozen base model and its tokenizer. Raises ConfigError as `load_pretrained`.

    The model is in float32 on the CPU or, if there is an accelerator, in bfloat16 there (on the CPU with `on_cpu`).
    `device`: which accelerator, if there are several; None: the process's.
    `in_4bit`: linear layers are quantized to 4 bits; raises ConfigError without bitsandbytes for this device.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from agl_trainer.model.device import best_device

    device = device or best_device()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    device = torch.device("cpu") if on_cpu else device
    tokenizer = load_pretrained(AutoTokenizer, folder)
    options = {"quantization_config": _in_4bit(device, dtype)} if in_4bit else {}
    model = load_pretrained(AutoModelForCausalLM, folder, dtype=dtype, device_map=device, **options).eval()
    if in_4bit:
        for module in model.modules():
            if hasattr(module, repacks := "support_avx512bf16_for_cpu"):
                # A pass without gradients would repack the weight into a layout without a backward pass.
                setattr(module, repacks, False)
    return model.requires_grad_(False), tokenizer


def check_4bit() -> None:
    """Raises ConfigError if bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("train.load_in_4bit needs bitsandbytes: pip install 'agl-trainer[qlora]'")


def _in_4bit(device: "torch.device", dtype: "torch.dtype") -> "BitsAndBytesConfig":
    """NF4 with quantized scales, as in QLoRA (arXiv 2305.14314, sections 3 and 4); products are computed in `dtype`."""
    check_4bit()
    import bitsandbytes

    known = sorted(bitsandbytes.supported_torch_devices)
    if device.type not in known:
        raise ConfigError(
            f"train.load_in_4bit: bitsandbytes {bitsandbytes.__version__} computes on {', '.join(known)}, not on "
            f"{device.type}, the device of this machine; leave it out"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def use_bfloat16_products(model: "PreTrainedModel") -> None:
    """Convert the linear layers to bfloat16 if this CPU multiplies it in hardware, which halves the memory reads.

    Sampled logprobs then differ from those that the trainer computes, by 0.02 in the median, because both round in
    different orders. The residual stream, attention, adapters and logits keep the model's dtype; `lora` casts.
    """
    import torch

    found = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older versions of torch
    if any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
        for module in model.get_decoder().modules():
            if isinstance(module, torch.nn.Linear):
                module.to(torch.bfloat16)
