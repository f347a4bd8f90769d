"""Intervals against values known from theory, pairing by task, and the table that a user reads."""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from agl.errors import TrainingError
from agl_trainer.report.evaluation import (
    Answers,
    EvalResult,
    TaskScore,
    comparison_json,
    comparison_table,
    mean_interval,
    paired_difference,
)


def result(label: str, rewards: list[float], **parts: list[float]) -> EvalResult:
    tasks = {
        f"q{index}": TaskScore(reward, {name: values[index] for name, values in parts.items()})
        for index, reward in enumerate(rewards)
    }
    return EvalResult(label, tasks)


def test_the_interval_of_a_large_sample_is_the_normal_one() -> None:
    sample = np.random.default_rng(1).normal(0.5, 0.2, size=400)
    interval = mean_interval(sample.tolist())
    half_width = NormalDist().inv_cdf(0.975) * sample.std() / math.sqrt(400)
    assert interval.mean == pytest.approx(sample.mean())
    assert interval.half_width == pytest.approx(half_width, rel=0.03)
    assert (interval.low + interval.high) / 2 == pytest.approx(sample.mean(), abs=0.001)


def test_the_interval_covers_the_true_mean_about_95_times_in_100() -> None:
    draw = np.random.default_rng(2)
    intervals = [mean_interval(draw.uniform(size=64).tolist(), seed=index) for index in range(200)]
    covered = sum(interval.low <= 0.5 <= interval.high for interval in intervals)
    assert 0.90 <= covered / 200 <= 0.99


def test_the_same_values_always_give_the_same_interval() -> None:
    values = np.random.default_rng(3).uniform(size=20).tolist()
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(values) != mean_interval(values, seed=1)


def test_equal_values_have_an_interval_of_no_width() -> None:
    interval = mean_interval([0.25] * 10)
    assert (interval.low, interval.mean, interval.high, interval.count) == (0.25, 0.25, 0.25, 10)


def test_one_value_has_an_infinite_interval() -> None:
    interval = mean_interval([0.25])
    assert (interval.low, interval.high) == (-math.inf, math.inf)


@pytest.mark.parametrize("values", [[], [0.5, math.nan]])
def test_no_mean_without_finite_values(values: list[float]) -> None:
    with pytest.raises(TrainingError, match="finite values"):
        mean_interval(values)


def test_a_paired_difference_is_independent_of_task_difficulty() -> None:
    """Each task gains 0.1, tasks differ by up to 10: without pairing the noise would hide it."""
    before = {f"q{index}": float(index) for index in range(10)}
    after = {task: value + 0.1 for task, value in reversed(before.items())}
    difference = paired_difference(before, after)
    assert (difference.low, difference.high) == (pytest.approx(0.1), pytest.approx(0.1))


def test_only_common_tasks_are_compared() -> None:
    difference = paired_difference({"a": 0.0, "b": 0.0, "gone": 9.0}, {"b": 1.0, "a": 0.5, "new": -9.0})
    assert (difference.mean, difference.count) == (0.75, 2)
    with pytest.raises(TrainingError, match="none of them the same"):
        paired_difference({"a": 1.0}, {"b": 1.0})


def test_a_saved_result_loads_unchanged(tmp_path: Path) -> None:
    saved = replace(result("sft", [0.5, 1.0], syntax=[1.0, 1.0], goal=[0.0, 1.0]), answers={"writer": Answers(2, 1)})
    saved.save(tmp_path / "eval" / "sft.json")
    assert EvalResult.load(tmp_path / "eval" / "sft.json") == saved
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["sft.json"]


@pytest.mark.parametrize("text", [None, "{", "[]", '{"label": "x", "tasks": {"q": {"score": 1}}}'])
def test_the_error_names_a_file_that_is_no_result(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "base.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(TrainingError, match=r"base\.json is not an evaluation result"):
        EvalResult.load(path)


def test_the_table_shows_means_and_paired_differences() -> None:
    """Columns that exceed 80 characters are in a table below."""
    base = result("base", [0.25] * 4, syntax=[0.5] * 4)
    sft = result("sft", [0.5] * 4, syntax=[1.0] * 4)
    rl = EvalResult("rl", {"q0": TaskScore(1.0, {"goal": 1.0}), "q1": TaskScore(1.0, {"goal": 1.0})})
    assert comparison_table([base, sft]).splitlines() == [
        "        base           sft            sft - base",
        "reward  0.250 ± 0.000  0.500 ± 0.000  +0.250 [+0.250, +0.250]",
        "syntax  0.500 ± 0.000  1.000 ± 0.000  +0.500 [+0.500, +0.500]",
        "mean over 4 tasks, 95 % bootstrap intervals; differences paired by task",
    ]
    assert comparison_table([base, sft, rl]).splitlines() == [
        "        base           sft            rl",
        "reward  0.250 ± 0.000  0.500 ± 0.000  1.000 ± 0.000 (n=2)",
        "syntax  0.500 ± 0.000  1.000 ± 0.000  -",
        "goal    -              -              1.000 ± 0.000 (n=2)",
        "        sft - base               rl - sft",
        "reward  +0.250 [+0.250, +0.250]  +0.500 [+0.500, +0.500] (n=2)",
        "syntax  +0.500 [+0.500, +0.500]  -",
        "goal    -                        -",
        "mean over 4 tasks, 95 % bootstrap intervals; differences paired by task",
    ]


def test_the_table_shows_a_policy_that_answers_every_task_alike() -> None:
    base = replace(result("base", [0.25] * 10), answers={"writer": Answers(10, 2)})
    rl = replace(result("rl", [0.5] * 10), answers={"writer": Answers(10, 9), "fixer": Answers(3, 3)})
    table = comparison_table([base, rl]).splitlines()
    assert table[2:4] == ["same answer, writer  2 of 10        9 of 10", "same answer, fixer   -              3 of 3"]
    assert table[-1] == "rl: 9 of 10 answers of writer are the same, whatever the task: its policy may have collapsed"
    assert sum("collapsed" in line for line in table) == 1  # three answers are too few to say so
    assert json.loads(comparison_json([rl]))["rl"]["answers"]["writer"] == {"count": 10, "commonest": 9}


def test_a_difference_over_one_task_has_no_bounds_in_json() -> None:
    found = json.loads(comparison_json([result("base", [0.25]), result("sft", [0.75])]), parse_constant=pytest.fail)
    assert found["sft - base"] == {"reward": {"mean": 0.5, "low": None, "high": None, "count": 1}}


def test_the_table_shows_how_many_rollouts_failed_or_have_no_reward() -> None:
    base = EvalResult("base", {"q0": TaskScore(0.0, failed=2), "q1": TaskScore(0.5, failed=1)}, without_reward=1)
    *_, failed, last = comparison_table([base, result("sft", [0.5, 0.5])]).splitlines()
    assert last == "base: 1 rollout without a reward, left out"
    assert failed == "base: 3 rollouts failed and count 0; the log has the error of each"
