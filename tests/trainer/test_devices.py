"""Two processes take the steps that one takes: the same losses, the same weights."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MODULE = "tests.trainer.several_devices"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(folder: Path, *launcher: str) -> dict[str, Any]:
    result = folder / f"{len(launcher)}.json"
    subprocess.run([sys.executable, *launcher, "-m", MODULE, str(result)], check=True, timeout=240)
    return json.loads(result.read_text())


def test_two_devices_train_as_one_does(tmp_path: Path) -> None:
    one, two = run(tmp_path), run(tmp_path, *TORCHRUN)
    assert (one["devices"], two["devices"]) == (1, 2)
    for name in ("losses", "norms", "weights"):
        assert two[name] == pytest.approx(one[name], rel=1e-9, abs=1e-12), name
    assert "first token has mask 1" in one["failure"]
    assert "a training step failed on 1 of 2 devices: device" in two["failure"]
    assert "first token has mask 1" in two["failure"]
