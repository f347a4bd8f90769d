"""What `agl doctor` and the commands of the trainer find of what the configuration names, before torch is loaded."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml

from agl.cli.doctor import CHECKS, Check
from agl.config import Config
from agl.errors import CommandError, ConfigError
from agl_trainer.cli.doctor import demand_for

AGENTS = """
def run(task): return "x"
def tasks(): return ({"id": name} for name in "abc")
def bad_tasks(): return [{"id": "a", "seen": {"when": __import__("datetime").date(2026, 1, 1)}}]
def failing(): raise KeyError("rows")
score = 3
"""
SOUND: dict[str, Any] = {
    "model": "tiny",
    "agent": "doctor_agents:run",
    "tasks": "doctor_agents:tasks",
    "eval_tasks": "doctor_agents:tasks",
    "instrument": ["agl_langchain"],
    "output_dir": "runs/x",
}


@pytest.fixture(autouse=True)
def in_a_folder_with_agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "doctor_agents.py").write_text(AGENTS)
    yield
    sys.modules.pop("doctor_agents", None)


def config(more: dict[str, Any] | None = None, **train: Any) -> Config:
    return Config.parse({"agent_roles": {"a": {}}, "train": SOUND | train} | (more or {}))


def checks(configured: Config) -> dict[str, Check]:
    """Those of `agl doctor`, through their entry point."""
    (point,) = entry_points(group=CHECKS, name="model")
    check: Callable[[Config], Iterator[Check]] = point.load()
    return {found.name: found for found in check(configured)}


def test_everything_that_a_sound_configuration_names_is_found() -> None:
    found = checks(config())
    assert {name: check.todo for name, check in found.items()} == dict.fromkeys(found, "")
    assert {"agent_roles", "train.model", "train.agent", "train.instrument", "train.output_dir"} <= found.keys()
    assert found["train.tasks"].found == "doctor_agents:tasks: 3 items"
    for command in ("train", "train --from-store", "eval"):
        demand_for(command, config())
    assert not Path("runs").exists() and not Path("agl.db").exists()


def test_each_of_several_models_is_checked_by_its_own_key() -> None:
    launch = {"kind": "vllm", "launch": {"program": "nowhere/vllm"}}
    given = {
        "models": {"small": {"path": "tiny"}, "large": {"path": "nowhere", "engine": launch}},
        "agent_roles": {"a": {"model": "large"}, "b": {"model": "small"}},
        "train": {key: value for key, value in SOUND.items() if key != "model"},
    }
    found = {name: check.todo for name, check in checks(Config.parse(given)).items() if "models" in name}
    assert found.pop("models.small.path") == ""
    assert "nowhere has no config.json" in found.pop("models.large.path")
    assert "no program nowhere/vllm" in found.pop("models.large.engine.launch") and not found


@pytest.mark.parametrize(
    ("train", "key", "problem"),
    [
        ({"model": "nowhere"}, "train.model", "nowhere has no config.json"),
        ({"agent": "doctor_agents:rum"}, "train.agent", "doctor_agents.py defines no 'rum'"),
        ({"reward": "doctor_agents:score"}, "train.reward", "is a int, expected a function"),
        ({"tasks": "no_module:tasks"}, "train.tasks", "there is no module 'no_module'"),
        ({"tasks": "doctor_agents:failing"}, "train.tasks", "raised KeyError: 'rows'"),
        ({"eval_tasks": "doctor_agents:bad_tasks"}, "train.eval_tasks", "item 0: 'seen': 'when' is datetime.date"),
        ({"instrument": ["agl_langchian"]}, "train.instrument", "no package offers 'agl_langchian'"),
        ({"report_to": ["wandb"]}, "train.report_to", "wandb is not installed: pip install wandb"),
        ({"output_dir": "doctor_agents.py/x"}, "train.output_dir", "doctor_agents.py cannot be written to"),
    ],
)
def test_each_problem_is_found_by_doctor_and_before_a_training(train: dict[str, Any], key: str, problem: str) -> None:
    found = checks(config(**train))
    assert [name for name, check in found.items() if not check.ok] == [key]
    assert problem in found[key].todo
    with pytest.raises(CommandError, match=f"^{key}: [^\n]*{problem}[^\n]*$"):
        demand_for("eval" if key == "train.eval_tasks" else "train", config(**train))


def test_problems_of_roles_judge_and_examples_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    judge = {"url": "http://127.0.0.1:9/v1", "model": "m", "criteria": "c"}
    for more, key, problem in (
        ({"agent_roles": {}}, "agent_roles", "names no role to train"),
        ({"judge": judge}, "judge", "it does not answer"),
        ({"judge": judge | {"key_env": "JUDGE_KEY"}}, "judge", "the environment has no JUDGE_KEY"),
        ({"sft": {"examples": "doctor_agents:none"}}, "sft.examples", "defines no 'none'"),
    ):
        found = checks(config(more))
        assert [name for name, check in found.items() if not check.ok] == [key]
        assert problem in found[key].todo


def test_packages_that_a_setting_needs_are_named_before_they_are_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    missing = ("gguf", "bitsandbytes")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in missing else find(name, *more))
    monkeypatch.setenv("AGL_CACHE", str(tmp_path / "cache"))
    (model,) = [check for name, check in checks(config(model="smollm2")).items() if name == "train.model"]
    assert "is read with the package gguf: pip install 'agl-trainer[gguf]'" in model.todo
    with pytest.raises(CommandError, match="load_in_4bit needs bitsandbytes: pip install"):
        demand_for("train", config(load_in_4bit=True))


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"train\.agent is not set"):
        demand_for("train", Config.parse({"agent_roles": {"a": {}}, "train": {"model": "tiny"}}))
    with pytest.raises(ConfigError, match="no `sft` section"):
        demand_for("sft", config())
    with pytest.raises(ConfigError, match="no section `train`"):
        demand_for("eval", Config())


@pytest.mark.parametrize("command", ["train", "sft", "eval"])
def test_a_command_ends_before_it_loads_torch(command: str) -> None:
    data = {"agent_roles": {"a": {}}, "train": SOUND | {"model": "nowhere"}, "sft": {"examples": "doctor_agents:tasks"}}
    Path("config.yaml").write_text(yaml.safe_dump(data))
    code = (
        f"import sys; from agl.cli import main; code = main([{command!r}, 'config.yaml']); "
        "print(*{name.partition('.')[0] for name in sys.modules}); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, "torch" in done.stdout.split()) == (2, False)
    assert done.stderr.startswith("agl: train.model: nowhere") and len(done.stderr.splitlines()) == 1


def test_the_help_of_all_commands_does_not_load_torch() -> None:
    code = "import sys, agl.cli\ntry: agl.cli.main(['--help'])\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "list, export and merge the adapters" in done.stdout and done.stderr == "False\n"


def test_without_a_model_there_is_nothing_to_check() -> None:
    assert checks(Config()) == {}
