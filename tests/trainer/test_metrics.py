"""Metrics of a run, and of a run that starts again after it was killed."""

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agl.store import Store, open_store
from agl_trainer.metrics import MetricsLog


@pytest.fixture
def store() -> Store:
    return open_store("memory://")


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def log_steps(store: Store, folder: Path, steps: range, *, run: str = "grpo", shift: float = 0.0) -> None:
    log = MetricsLog(store, run, folder, first_step=steps.start)
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
