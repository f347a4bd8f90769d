"""Checkpoints from which a training resumes exactly: one folder per step, written atomically.

    <folder>/step-000012/
        adapters/<role>/adapter_model.safetensors, adapter_config.json    a PEFT adapter
        references/<role>/...                                             the adapter as GRPO began, for the KL term
        optimizer.safetensors                                             moments of every adapter's optimizer
        state.json                                                        step, phase, position, RNG, versions, config
        SHA256SUMS                                                        of all these files, as sha256sum(1) reads it

A folder is written under a hidden name, synced to disk, then renamed, so a process killed at any moment leaves the last
complete checkpoint intact. Nothing is pickled.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from agl.config.section import NAME_RULE, is_name
from agl.errors import TrainingError
from agl_trainer.loop import optimizer_state, rng
from agl_trainer.model.adapter_files import (
    CONFIG,
    WEIGHTS,
    Tensors,
    contiguous_copies,
    read_tensors,
    save_adapter,
    to_json,
    write_synced,
)

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d+)(\.old)?")
_SUMS = "SHA256SUMS"
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.EBADMSG)
"""Errors of a file that is missing, or that the disk lost; with others, e.g. missing rights, it may be intact."""


class _UnreadableError(TrainingError):
    """A checkpoint that may be intact cannot be read, so that an older one must not take its place."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything that the next step depends on."""

    step: int
    """Steps done in all phases that share the folder; the newest checkpoint has the highest."""
    phase: str
    position: int
    """Tasks or examples drawn in the phase."""
    versions: dict[str, int]
    """Role to the version of its policy."""
    adapters: Mapping[str, Tensors]
    """Role to the tensors of its adapter, named as in PEFT."""
    adapter_configs: Mapping[str, Mapping[str, Any]]
    """Role to `LoraConfig.to_dict()`."""
    optimizers: Mapping[str, dict[str, Any]]
    """Owner of an adapter to `optimizer.state_dict()`."""
    config: str
    """`Config.to_yaml()`."""
    base: Mapping[str, str] = field(default_factory=dict)
    """`fingerprints` of the base models."""
    phase_step: int = 0
    """Steps done in the phase."""
    epoch_size: int = 0
    """Tasks or examples of an epoch of the phase."""
    open_groups: list[int] = field(default_factory=list)
    """Numbers of the groups that were in flight beside the training."""
    empty_steps: int = 0
    """Last steps of the phase, in a row, in which no call trained."""
    references: Mapping[str, Tensors] | None = None
    """Owner of an adapter to the adapter as GRPO began, except fresh ones; None: not kept."""
    baselines: dict[str, float] = field(default_factory=dict)
    """Role to the running mean of its rewards."""
    baseline_weights: dict[str, float] = field(default_factory=dict)
    """Role to the weight of that mean; see `next_baseline`."""
    best: dict[str, Any] | None = None
    """Fields of the best evaluation so far, a `state.Best`."""
    rng: dict[str, Any] = field(default_factory=rng.capture)
    """`rng.capture()` at the creation of the checkpoint."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `checkpoint` below `folder`, replacing one of the same step; returns the checkpoint's folder.

    Raises TrainingError if the disk is full or the folder not writable; earlier checkpoints are then intact.
    """
    target = checkpoint_folder(folder, checkpoint.step)
    draft = folder / f".writing-{target.name}"
    try:
        _remove(draft)
        _write(draft, checkpoint)
        _swap(draft, target)
    except OSError as error:
        with suppress(OSError):
            _remove(draft)  # It takes space that the user may not have.
        where = error.filename or target
        raise TrainingError(
            f"cannot write the checkpoint of step {checkpoint.step}: {where}: {error.strerror}; earlier checkpoints "
            "are whole. Make room or give access, then start the same command again, which resumes from the last one"
        ) from error
    return target


def _write(draft: Path, checkpoint: Checkpoint) -> None:
    for role, tensors in checkpoint.adapters.items():
        save_adapter(draft / _adapter_folder("adapters", role), tensors, checkpoint.adapter_configs[role])
    for owner, tensors in (checkpoint.references or {}).items():
        save_adapter(draft / _adapter_folder("references", owner), tensors, checkpoint.adapter_configs[owner])
    write_synced(draft / "optimizer.safetensors", _pack_optimizers(checkpoint.optimizers))
    write_synced(draft / "state.json", _state_json(checkpoint))
    sums = "".join(f"{_digest(path)}  {path.relative_to(draft)}\n" for path in _files(draft))
    write_synced(draft / _SUMS, sums.encode())
    for path in (draft, *(path for path in draft.rglob("*") if path.is_dir())):
        _sync(path)


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint in `folder`, else None; warns of damaged ones, raises TrainingError if all are.

    A file that this process may not read is no damage: it raises TrainingError too.
    """
    found = find_checkpoints(folder)
    for path in reversed(found):
        try:
            return load_checkpoint(path)
        except _UnreadableError:
            raise
        except TrainingError as error:
            logger.warning("%s; trying the checkpoint before it", error)
    if found:
        raise TrainingError(f"all {len(found)} checkpoints in {folder} are damaged; remove the folder to start again")
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`. Raises TrainingError with the name of a missing or changed file.

    Only the files of the checkpoint are read, so that others in its folder do no harm.
    """
    try:
        listed = _read_sums(path)
        plain = json.loads(_verified(path, "state.json", listed).read_text(encoding="utf-8"))
        adapters, configs = {}, {}
        for role in plain.pop("roles"):
            folder = _adapter_folder("adapters", role)
            adapters[role] = read_tensors(_verified(path, f"{folder}/{WEIGHTS}", listed))
            configs[role] = json.loads(_verified(path, f"{folder}/{CONFIG}", listed).read_text("utf-8"))
        references = plain.pop("references", None)
        if references is not None:
            folders = {owner: _adapter_folder("references", owner) for owner in references}
            files = {owner: _verified(path, f"{folder}/{WEIGHTS}", listed) for owner, folder in folders.items()}
            references = {owner: read_tensors(file) for owner, file in files.items()}
        optimizers = _unpack_optimizers(_verified(path, "optimizer.safetensors", listed))
        return Checkpoint(
            **plain, adapters=adapters, adapter_configs=configs, references=references, optimizers=optimizers
        )
    except TypeError as error:
        raise TrainingError(f"checkpoint {path}: another version of agl wrote it ({error})") from error
    except OSError as error:
        kind = TrainingError if error.errno in _DAMAGE else _UnreadableError
        raise kind(f"checkpoint {path}: cannot read {error.filename}: {error.strerror}") from error


def prune(folder: Path, step: int, keep: int = 2) -> None:
    """Remove all but the newest `keep` (at least 1) checkpoints up to `step`, and what a killed process left behind."""
    ours = [path for path in find_checkpoints(folder) if _order(path) <= _order(checkpoint_folder(folder, step))]
    _discard(folder, ours[:-keep])


def keep_only(folder: Path, step: int) -> None:
    """Remove all checkpoints except that of `step`, and what a killed process left behind."""
    _discard(folder, [path for path in find_checkpoints(folder) if path != checkpoint_folder(folder, step)])


def checkpoint_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def find_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders from oldest to newest; a checkpoint that is being replaced precedes its replacement.

    Anything else in `folder` is ignored. Raises TrainingError if `folder` cannot be read.
    """
    try:
        found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TrainingError(f"cannot read the checkpoints in {folder}: {error.strerror}") from error
    return sorted(found, key=_order)


def _adapter_folder(kind: str, role: str) -> str:
    """Raises TrainingError for a role that names no folder below `kind`: a checkpoint may come from others."""
    if not is_name(role):
        raise TrainingError(f"a checkpoint cannot have the role {role!r}, expected {NAME_RULE}")
    return f"{kind}/{role}"


def _order(path: Path) -> tuple[int, bool]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), match[2] is None


def _discard(folder: Path, checkpoints: Iterable[Path]) -> None:
    for pattern in (".removing-*", ".writing-*"):
        for path in folder.glob(pattern):
            _remove(path)
    for path in checkpoints:
        # Renamed first, so that a process killed here leaves no folder that looks like a damaged checkpoint.
        _remove(path.rename(path.with_name(f".removing-{path.name}")))


def _swap(draft: Path, target: Path) -> None:
    old = target.with_name(f"{target.name}.old")
    if target.exists():
        _remove(old)
        target.rename(old)
    draft.rename(target)
    _sync(target.parent)
    _remove(old)


def _read_sums(path: Path) -> dict[str, str]:
    """Name to digest of each file that `SHA256SUMS` lists."""
    lines = (path / _SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _verified(path: Path, name: str, listed: Mapping[str, str]) -> Path:
    """File `name` of the checkpoint `path`. Raises TrainingError if it is not what `listed` has."""
    file = path / name
    if name not in listed or not file.exists():
        raise TrainingError(f"checkpoint {path}: {name} is missing or not listed in {_SUMS}")
    if _digest(file) != listed[name]:
        raise TrainingError(f"checkpoint {path}: {name} has changed since it was written (sha256 differs)")
    return file


def _state_json(checkpoint: Checkpoint) -> bytes:
    tensors = ("adapters", "adapter_configs", "optimizers")
    values = {name: getattr(checkpoint, name) for name in Checkpoint.__dataclass_fields__ if name not in tensors}
    references = None if checkpoint.references is None else list(checkpoint.references)
    return to_json(values | {"roles": list(checkpoint.adapters), "references": references})


def _pack_optimizers(optimizers: Mapping[str, dict[str, Any]]) -> bytes:
    tensors: dict[str, torch.Tensor] = {}
    texts: dict[str, str] = {}
    for role, state in optimizers.items():
        parts, texts[role] = optimizer_state.flatten(state)
        tensors |= {f"{role}/{name}": tensor for name, tensor in parts.items()}
    # None: with an empty mapping, safetensors writes an invalid header.
    return save(contiguous_copies(tensors), metadata=texts or None)


def _unpack_optimizers(path: Path) -> dict[str, dict[str, Any]]:
    tensors = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        texts: dict[str, str] = file.metadata() or {}
    return {
        role: optimizer_state.unflatten(
            {name.removeprefix(f"{role}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{role}/")},
            text,
        )
        for role, text in texts.items()
    }


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
