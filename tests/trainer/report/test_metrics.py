"""Metrics of a run, and of a run that resumes after it was killed."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agl.errors import ConfigError
from agl.store import Store, open_store
from agl_trainer.report.metrics import MetricsLog
from agl_trainer.report.trackers import open_trackers


@pytest.fixture
def store() -> Store:
    return open_store("memory://")


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def log_steps(store: Store, folder: Path, steps: range, *, run: str = "grpo", shift: float = 0.0) -> None:
    trackers = open_trackers([], run, folder, {}, steps.start)
    log = MetricsLog(store, run, folder, first_step=steps.start, trackers=trackers)
    for step in steps:
        log.append(step, {"reward": step + shift, "loss": 1.0})
    log.close()


def test_metrics_reach_the_store_the_file_and_tensorboard(store: Store, tmp_path: Path) -> None:
    log_steps(store, tmp_path, range(1, 3))
    assert store.query_metrics("grpo") == {"loss": [(1, 1.0), (2, 1.0)], "reward": [(1, 1.0), (2, 2.0)]}
    assert [(line["run"], line["step"], line["metrics"]) for line in lines(tmp_path)] == [
        ("grpo", 1, {"reward": 1.0, "loss": 1.0}),
        ("grpo", 2, {"reward": 2.0, "loss": 1.0}),
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard" / "grpo")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("reward")] == [(1, 1.0), (2, 2.0)]


def test_a_resumed_run_replaces_the_steps_it_repeats(store: Store, tmp_path: Path) -> None:
    log_steps(store, tmp_path, range(1, 6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"run": "grpo", "step": 6, "met')  # killed in the middle of a line
    time.sleep(1 - time.time() % 1)  # TensorBoard sorts files by second, and a restart takes longer than one.
    log_steps(store, tmp_path, range(4, 7), shift=0.5)
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5), (5, 5.5), (6, 6.5)]
    assert [(line["step"], line["metrics"]["reward"]) for line in lines(tmp_path)] == expected
    assert store.query_metrics("grpo")["reward"] == expected
    board = EventAccumulator(str(tmp_path / "tensorboard" / "grpo")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("reward")] == expected


def test_another_run_in_the_same_folder_keeps_its_lines(store: Store, tmp_path: Path) -> None:
    log_steps(store, tmp_path, range(1, 4), run="sft")
    log_steps(store, tmp_path, range(1, 3), run="grpo")
    assert [(line["run"], line["step"]) for line in lines(tmp_path)] == [
        ("sft", 1),
        ("sft", 2),
        ("sft", 3),
        ("grpo", 1),
        ("grpo", 2),
    ]


def test_a_value_that_is_not_finite_is_null_in_the_file_and_absent_from_the_store(store: Store, tmp_path: Path) -> None:
    log = MetricsLog(store, "grpo", tmp_path)
    log.append(1, {"loss": math.nan, "reward": 0.5, "kl": math.inf})
    log.close()
    assert lines(tmp_path)[0]["metrics"] == {"loss": None, "reward": 0.5, "kl": None}
    assert store.query_metrics("grpo") == {"reward": [(1, 0.5)]}


class FakeTracker:
    """Records the calls of fake modules `wandb` and `mlflow`."""

    def __init__(self) -> None:
        self.settings: list[dict[str, Any]] = []
        self.logged: list[tuple[str, float, int]] = []
        self.params: dict[str, str] = {}
        self.ended = 0
        self.id = "run-7"

    # wandb
    def init(self, **settings: Any) -> "FakeTracker":
        self.settings.append(settings)
        return self

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.logged += [(name, value, step) for name, value in metrics.items()]

    def finish(self) -> None:
        self.ended += 1

    # mlflow
    MlflowClient: Any = property(lambda self: lambda: self)
    experiment_id = "3"

    def set_experiment(self, name: str) -> "FakeTracker":
        assert name == "agl"
        return self

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.settings.append({"experiment": experiment, "name": run_name})
        return SimpleNamespace(info=SimpleNamespace(run_id=self.id))

    def log_param(self, run_id: str, name: str, value: str) -> None:
        self.params[name] = value

    def log_metric(self, run_id: str, name: str, value: float, step: int) -> None:
        assert run_id == self.id
        self.logged.append((name, value, step))

    def set_terminated(self, run_id: str) -> None:
        self.ended += 1


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_resumed_training_continues_its_run_in_a_tracker(
    name: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = FakeTracker()
    monkeypatch.setitem(sys.modules, name, tracker)
    config = {"train": {"steps": 3}}
    for step in (1, 2):
        log = MetricsLog(store, "shop", tmp_path, trackers=open_trackers([name], "shop", tmp_path, config, step)[:1])
        log.append(step, {"eval/reward/pass@1": 0.5, "loss": math.nan})
        log.close()
    key = "eval.reward.pass_at_1" if name == "mlflow" else "eval/reward/pass@1"
    assert tracker.logged == [(key, 0.5, 1), (key, 0.5, 2)]
    assert tracker.ended == 2
    if name == "wandb":
        assert [(made["name"], made.get("id")) for made in tracker.settings] == [("shop", None), ("shop", "run-7")]
        assert tracker.settings[0]["project"] == "agl" and tracker.settings[0]["config"] == config
    else:
        assert tracker.settings == [{"experiment": "3", "name": "shop"}]
        assert tracker.params == {"train.steps": "3"}


class BrokenTracker:
    """A tracker whose server is gone."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        raise ConnectionError("no route to host")

    def close(self) -> None:
        raise SystemError("still no route")


def test_a_tracker_that_fails_is_named_once_and_ends_nothing(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = MetricsLog(store, "grpo", tmp_path, trackers=[BrokenTracker()])
    for step in (1, 2):
        log.append(step, {"reward": 0.5})
    log.close()
    assert store.query_metrics("grpo")["reward"] == [(1, 0.5), (2, 0.5)]
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "BrokenTracker lacks metrics: ConnectionError: no route to host; the training"
    )


def test_no_name_in_mlflow_is_a_folder_of_another_one(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file store has a file for each name, in which slashes are folders."""
    tracker = FakeTracker()
    monkeypatch.setitem(sys.modules, "mlflow", tracker)
    log = MetricsLog(store, "shop", tmp_path, trackers=open_trackers(["mlflow"], "shop", tmp_path, {}, 1)[:1])
    log.append(1, {"calls": 2.0, "calls/dropped/no_ids": 1.0, "../reward: a/b": 1.0})
    log.close()
    names = [name for name, _, _ in tracker.logged]
    assert names == ["calls", "calls.dropped.no_ids", "...reward_ a.b"]


def test_a_tracker_that_cannot_begin_is_an_error_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: 1 / 0))
    tracker = FakeTracker()
    monkeypatch.setitem(sys.modules, "mlflow", tracker)
    with pytest.raises(ConfigError, match=r"names wandb, which cannot begin a run \(ZeroDivisionError: "):
        open_trackers(["mlflow", "wandb"], "shop", tmp_path, {}, 1)
    assert tracker.ended == 1, "the run that had begun is ended"


def test_the_error_names_a_tracker_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"train\.report_to names wandb, which is not installed: pip install wandb"):
        open_trackers(["wandb"], "shop", tmp_path, {}, 1)
