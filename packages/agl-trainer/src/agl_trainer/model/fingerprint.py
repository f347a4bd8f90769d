"""A fingerprint of a base model, by which a checkpoint recognises the model that its adapters were trained on."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

_ROWS = 8
"""Rows of each tensor that are hashed: fine-tuning and other seeds change all of them."""
_INCIDENTAL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Keys of `config.json` that do not change what a model computes, apart from its rounding."""


def fingerprint(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Hashes of the `architecture`, `weights` and `tokenizer` (with its chat template) of the model in `folder`.

    Read from the files, so that device, dtype, quantisation and sharding do not matter; of the weights only a sample,
    so that it takes a moment for large models too.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = {name: value for name, value in config.items() if name not in _INCIDENTAL}
    weights = hashlib.sha256()
    for name, rows in sorted(_sampled_weights(folder)):
        weights.update(name.encode())
        weights.update(rows)
    texts = {"vocabulary": sorted(tokenizer.get_vocab().items()), "template": tokenizer.chat_template}
    return {"architecture": _hash(architecture), "weights": weights.hexdigest(), "tokenizer": _hash(texts)}


def _sampled_weights(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and sampled rows of each tensor, in float32."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is not a mapping
                shape = file.get_slice(name).get_shape()
                rows = file.get_slice(name)[:: max(1, shape[0] // _ROWS)] if shape else file.get_tensor(name)
                yield name, repr(shape).encode() + rows.float().numpy().tobytes()


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
