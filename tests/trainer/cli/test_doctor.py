"""The model check of `agl doctor`, through its entry point."""

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path

from agl.cli.doctor import CHECKS, Check
from agl.config import Config


def model_checks(model: str) -> list[Check]:
    (point,) = entry_points(group=CHECKS, name="model")
    check: Callable[[Config], Iterator[Check]] = point.load()
    train = {"model": model, "agent": "agents:run", "tasks": "agents:tasks"}
    return list(check(Config.parse({"train": train})))


def test_a_folder_with_a_model_is_found(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    (check,) = model_checks(str(tmp_path))
    assert (check.ok, check.found) == (True, f"{tmp_path} in {tmp_path}")


def test_the_problem_of_a_missing_model_names_its_folder(tmp_path: Path) -> None:
    (check,) = model_checks(str(tmp_path / "nowhere"))
    assert not check.ok
    assert "nowhere has no config.json" in check.todo


def test_the_tiny_model_is_always_available() -> None:
    assert [check.ok for check in model_checks("tiny")] == [True]


def test_without_a_model_there_is_nothing_to_check() -> None:
    (point,) = entry_points(group=CHECKS, name="model")
    assert list(point.load()(Config())) == []
