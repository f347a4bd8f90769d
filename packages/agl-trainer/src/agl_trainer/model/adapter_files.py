"""The files of a PEFT adapter, and how they are written: synced to disk, without pickle."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

Tensors = Mapping[str, "torch.Tensor"]


def save_adapter(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> None:
    """Write a PEFT adapter folder that `PeftModel.from_pretrained` and vLLM can load."""
    from safetensors.torch import save

    write_synced(folder / WEIGHTS, save(contiguous_copies(tensors), metadata={"format": "pt"}))
    write_synced(folder / CONFIG, to_json(config))


def amplified_adapter(folder: Path, new: Path, factor: int) -> Path:
    """Make `new`, beside `folder`, of the same weights with a `lora_alpha` that is `factor` times as large."""
    config = json.loads((folder / CONFIG).read_text())
    new.mkdir(exist_ok=True)
    (new / WEIGHTS).unlink(missing_ok=True)
    (new / WEIGHTS).symlink_to(Path("..", folder.name, WEIGHTS))
    write_synced(new / CONFIG, to_json(config | {"lora_alpha": config["lora_alpha"] * factor}))
    return new


def contiguous_copies(tensors: Tensors) -> "dict[str, torch.Tensor]":
    """Copies on the CPU; safetensors rejects tensors that share storage or are strided."""
    import torch

    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}


def read_tensors(path: Path) -> "dict[str, torch.Tensor]":
    """All tensors of a safetensors file, on the CPU."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is not a mapping


def to_json(value: Any) -> bytes:
    """JSON text of `value`; sets become sorted lists."""
    return json.dumps(value, indent=1, default=_sorted_set).encode()


def _sorted_set(value: Any) -> Any:
    """JSON form of a set, which PEFT uses for `target_modules`."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__}: {value!r}")


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and sync it to disk; missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
