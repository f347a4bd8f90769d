"""Finds the adapters that a training wrote, exports them, and merges them into their base model.

Reads only `adapter_model.safetensors` and `adapter_config.json` of a folder, never pickled files.
"""

import json
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from agl.config.section import is_name
from agl.errors import CommandError
from agl_trainer.model.adapter_files import CONFIG, WEIGHTS
from agl_trainer.model.model_folder import load_pretrained

logger = logging.getLogger(__name__)

PUBLISHED = "adapters"
"""Folder of the adapters that training phases publish for serving."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A PEFT folder with one version of the adapter of `role`."""

    role: str
    version: int
    folder: Path
    kept_in: str
    """`PUBLISHED`, or the name of a checkpoint."""

    @property
    def name(self) -> str:
        return f"{self.role}@{self.version}"

    def config(self) -> dict[str, Any]:
        """`adapter_config.json`. Raises CommandError if it cannot be read."""
        return _read_json(self.folder / CONFIG)

    def count_parameters(self) -> int:
        """Number of weights. Raises CommandError if the file is not safetensors."""
        with _opened(self.folder / WEIGHTS, "numpy") as file:
            names = file.keys()
            return sum(math.prod(file.get_slice(name).get_shape()) for name in names)

    def tensors(self) -> dict[str, Any]:
        """The tensors on the CPU, named as in PEFT. Raises CommandError if the file is not safetensors."""
        with _opened(self.folder / WEIGHTS, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is not a mapping


def find_adapters(output_dir: Path) -> list[Adapter]:
    """All adapters below the output folder of a training, one per version, sorted by role and version."""
    found: dict[str, Adapter] = {}
    for adapter in (*_published(output_dir / PUBLISHED), *_checkpointed(output_dir / "checkpoints")):
        found.setdefault(adapter.name, adapter)
    return sorted(found.values(), key=lambda adapter: (adapter.role, adapter.version))


def pick_adapter(adapters: Sequence[Adapter], name: str) -> Adapter:
    """Adapter `writer@3`, or the served one of `writer`: latest published, else latest. Raises CommandError if none."""
    matching = [adapter for adapter in adapters if name in (adapter.name, adapter.role)]
    if not matching:
        known = ", ".join(adapter.name for adapter in adapters) or "none: train first"
        raise CommandError(f"there is no adapter {name!r}; there are {known}")
    published = [adapter for adapter in matching if adapter.kept_in == PUBLISHED]
    return (published or matching)[-1]


def export_adapter(adapter: Adapter, base: Path, target: Path) -> None:
    """Write `adapter` to the new folder `target`, with `base` as its base model.

    Raises CommandError if the folder is not empty or the adapter cannot be read.
    """
    adapter.count_parameters()
    config = adapter.config() | {"base_model_name_or_path": str(base.resolve())}
    with _new_folder(target) as draft:
        shutil.copyfile(adapter.folder / WEIGHTS, draft / WEIGHTS)
        (draft / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")


def merge_adapter(adapter: Adapter, base: Path, target: Path) -> None:
    """Merge `adapter` into the weights of the model in `base`, and write model and tokenizer to the folder `target`.

    In float32 on the CPU. Raises CommandError as `export_adapter`.
    """
    import torch
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    tensors, config = adapter.tensors(), LoraConfig.from_pretrained(str(adapter.folder))
    disable_progress_bar()
    with _new_folder(target) as draft, warnings.catch_warnings():
        # PEFT reads an attribute that transformers renamed; users cannot fix that.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = load_pretrained(AutoModelForCausalLM, base, dtype=torch.float32)
        peft: Any = get_peft_model(model, config)  # its annotation lacks merge_and_unload
        missed = set_peft_model_state_dict(peft, tensors)
        if missed.unexpected_keys:
            raise CommandError(f"{adapter.folder} does not fit {base}: it has no {missed.unexpected_keys[0]}")
        peft.merge_and_unload().save_pretrained(draft)
        load_pretrained(AutoTokenizer, base).save_pretrained(draft)


def _published(folder: Path) -> Iterator[Adapter]:
    for path in sorted(folder.glob("*@*")):
        role, _, number = path.name.rpartition("@")
        if number.isdigit() and (path / CONFIG).is_file():  # written last; without it the adapter is incomplete
            yield Adapter(role, int(number), path, PUBLISHED)


def _checkpointed(folder: Path) -> Iterator[Adapter]:
    from agl_trainer.loop.checkpoint import find_checkpoints  # It loads torch.

    for path in find_checkpoints(folder):
        try:
            versions = _read_json(path / "state.json")["versions"]
        except CommandError as error:
            logger.warning("%s; the adapters of this checkpoint are left out", error)
            continue
        for role, version in versions.items():
            if is_name(role) and (path / "adapters" / role / CONFIG).is_file():
                yield Adapter(role, version, path / "adapters" / role, path.name)


@contextmanager
def _opened(path: Path, framework: str) -> Iterator[Any]:
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CommandError(f"{path} has no adapter in safetensors: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {path}: {error}") from error


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `target` once it is complete."""
    if target.exists() and any(target.iterdir()):
        raise CommandError(f"{target} is not empty; name a new folder with --to")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        yield draft
        draft.chmod(0o755)
        os.replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
