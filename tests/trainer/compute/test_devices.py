"""Training steps on two processes give the same losses and weights as on one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agl.config import Config
from agl.errors import ConfigError
from agl_trainer.loop.session import open_session
from tests.ports import free_port

MODULE = "tests.trainer.several_devices"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WAYS = ("plain", "fsdp", "fsdp-recompute", "fsdp-padded")


def run(folder: Path, devices: int, *ways: str) -> subprocess.CompletedProcess[str]:
    launcher = TORCHRUN if devices == 2 else []
    command = [sys.executable, *launcher, "-m", MODULE, str(folder), *(f"{way}:{free_port()}" for way in ways)]
    return subprocess.run(command, check=False, timeout=240, text=True, capture_output=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By devices and way. One process computes only `plain`: how makes no difference to it, as other tests show."""
    folder = tmp_path_factory.mktemp("results")
    for devices, ways in ((1, WAYS[:1]), (2, WAYS)):
        ended = run(folder, devices, *ways)
        assert ended.returncode == 0, ended.stderr
    return {path.stem: json.loads(path.read_text()) for path in folder.iterdir()}


@pytest.mark.parametrize("way", WAYS)
def test_two_devices_train_as_one_does(results: dict[str, dict[str, Any]], way: str) -> None:
    one, two = results["1-plain"], results[f"2-{way}"]
    assert (one["devices"], two["devices"]) == (1, 2)
    for name in ("losses", "norms", "weights"):
        assert two[name] == pytest.approx(one[name], rel=1e-9, abs=1e-12), name
    assert not one["sharded"]
    if "fsdp" in way:
        kept = [name for name in two["sharded"] if "lora_" in name or ".layers." not in name]
        # Seven linear layers and two norms of each of two layers.
        assert (len(two["sharded"]), kept) == (18, [])
    else:
        # The failure of one device is reported, and the next step succeeds.
        assert "first token has mask 1" in one["failure"]
        assert "a training step failed on 1 of 2 devices: device" in two["failure"]
        assert "first token has mask 1" in two["failure"]


def test_the_engine_that_samples_from_the_policy_itself_is_refused_sharded_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("policy_setup", "engines"):
        monkeypatch.setattr(f"agl_trainer.loop.{module}.device_count", lambda: 2)
    train = {"model": "smollm2", "agent": "examples.sql_agent.agent:run", "fsdp": True, "output_dir": str(tmp_path)}
    config = Config.model_validate(
        {"store_uri": f"sqlite:///{tmp_path}/agl.db", "agent_roles": {"writer": {}}, "train": train}
    )
    with pytest.raises(ConfigError, match=r"across 2 devices.*engine: \{kind: vllm\}"), open_session(config):
        pass


def test_with_sharded_layers_a_device_that_fails_ends_the_training(tmp_path: Path) -> None:
    """The others wait for its part of a layer: none can go on."""
    ended = run(tmp_path, 2, "fsdp-failing")
    assert ended.returncode != 0
    assert "a training step failed on device" in ended.stderr
    assert "first token has mask 1" in ended.stderr
    assert not any(tmp_path.iterdir())
