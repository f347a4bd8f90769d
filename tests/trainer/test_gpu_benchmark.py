"""`benchmarks/gpu.py` on the CPU, with small shapes: what runs on a GPU later has run here."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import gpu

ROOT = Path(__file__).parents[2]


def test_all_checks_run_and_are_right() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--small"]
    # Also on a machine with a GPU.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert not [line for line in lines if "WRONG" in line]
    for part in (
        "gradient, packed",
        "gradient, recomputed",
        "FlexAttention",
        "FSDP",
        "QLoRA",
        "restart",
        "tokens/s",
        "MFU",
    ):
        assert any(part in line for line in lines), part


def wrong(_machine: gpu.Machine) -> Iterator[gpu.Result]:
    yield gpu.compare("something", gpu.torch.ones(3), gpu.torch.full((3,), float("nan")), 1e-3)


def fails(_machine: gpu.Machine) -> Iterator[gpu.Result]:
    yield gpu.Result("before", "fine")
    raise ValueError("a kernel is missing")


@pytest.mark.parametrize(("check", "found"), [(wrong, "| something | nan |"), (fails, "a kernel is missing")])
def test_what_is_wrong_ends_with_exit_code_1(
    check: object, found: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "CHECKS", (check,))
    assert gpu.main(["--small"]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert found in line
