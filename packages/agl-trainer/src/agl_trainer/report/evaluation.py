"""Evaluation results, and their statistics: means and paired differences with confidence intervals.

Intervals are percentile bootstrap intervals over tasks (Efron and Tibshirani, An Introduction to the Bootstrap, 13.3)
with a fixed seed, so that the same results always print the same table.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from agl.cli.terminal import counted, stack
from agl.errors import TrainingError

RESAMPLES = 10_000
_MANY_ANSWERS, _COLLAPSED_FROM = 8, 0.9
"""Number of answers, and share of the commonest of them, from which a line says so."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over `count` tasks and its confidence interval."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def signed(self) -> str:
        """The interval of a difference, e.g. `+0.041 [-0.010, +0.093]`."""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True, slots=True)
class TaskScore:
    """Reward of one task and its parts, each a mean over the task's rollouts."""

    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)
    failed: int = 0
    """Rollouts that ended with an error or a timeout; they count as 0."""


@dataclass(frozen=True, slots=True)
class Answers:
    """How uniform a role's last answers in its rollouts are."""

    count: int
    commonest: int
    """How many of them are the commonest one, token for token."""

    @property
    def share(self) -> float:
        """Share of the commonest answer; 1 if all are the same."""
        return self.commonest / self.count

    def __str__(self) -> str:
        return f"{self.commonest} of {self.count}"


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Scores of one policy (`base`, `sft`, `grpo`) on the held-out tasks, by task id."""

    label: str
    tasks: Mapping[str, TaskScore]
    answers: Mapping[str, Answers] = field(default_factory=dict)
    """By role."""
    without_reward: int = 0
    """Rollouts that are left out because they have no reward."""

    @property
    def parts(self) -> list[str]:
        """Names of the reward parts, in the order of their first appearance."""
        return list(dict.fromkeys(part for score in self.tasks.values() for part in score.parts))

    @property
    def failed(self) -> int:
        """Number of rollouts that failed and count as 0."""
        return sum(score.failed for score in self.tasks.values())

    def scores(self, part: str | None = None) -> dict[str, float]:
        """Reward by task id, or one part of it, for the tasks that have this part."""
        if part is None:
            return {task: score.reward for task, score in self.tasks.items()}
        return {task: score.parts[part] for task, score in self.tasks.items() if part in score.parts}

    def mean(self, part: str | None = None) -> float:
        """Mean of the reward, or of one part of it."""
        values = list(self.scores(part).values())
        return sum(values) / len(values)

    def doubts(self) -> list[str]:
        """Lines about failed rollouts, those without a reward, and roles that give nearly all tasks the same answer."""
        counts = {
            "failed and count 0; the log has the error of each": self.failed,
            "without a reward, left out": self.without_reward,
        }
        lines = [f"{self.label}: {counted(number, 'rollout')} {what}" for what, number in counts.items() if number]
        return lines + [
            f"{self.label}: {answers} answers of {role} are the same, whatever the task: its policy may have collapsed"
            for role, answers in self.answers.items()
            if answers.count >= _MANY_ANSWERS and answers.share >= _COLLAPSED_FROM
        ]

    def save(self, path: Path) -> None:
        """Write a JSON file for `load`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.draft")
        draft.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        os.replace(draft, path)

    @classmethod
    def load(cls, path: Path) -> "EvalResult":
        """Read a file of `save`. Raises TrainingError if it does not exist or is not an evaluation result."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            answers = {role: Answers(**counts) for role, counts in data["answers"].items()}
            tasks = {task: TaskScore(**score) for task, score in data["tasks"].items()}
            return cls(data["label"], tasks, answers, data["without_reward"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"{path} is not an evaluation result of `agl eval`: {error!r}") from error


def mean_interval(values: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Mean and bootstrap interval, infinite for a single value. Raises TrainingError for no or non-finite values."""
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0 or not np.isfinite(sample).all():
        raise TrainingError(f"an interval needs finite values, got {list(values)[:8]} ({sample.size} in all)")
    mean = float(sample.mean())
    if sample.size == 1:
        return Interval(mean, -float("inf"), float("inf"), 1)
    drawn = np.random.default_rng(seed).integers(sample.size, size=(RESAMPLES, sample.size))
    low, high = np.quantile(sample[drawn].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean, float(low), float(high), sample.size)


def paired_difference(before: Mapping[str, float], after: Mapping[str, float], *, seed: int = 0) -> Interval:
    """Mean of `after - before` over common tasks, resampled by task. Raises TrainingError if there is none."""
    shared = [task for task in before if task in after]
    if not shared:
        raise TrainingError(
            f"nothing to compare: {len(before)} tasks before and {len(after)} after, none of them the same"
        )
    return mean_interval([after[task] - before[task] for task in shared], seed=seed)


def comparison_table(results: Sequence[EvalResult]) -> str:
    """Table of text: rows are the reward and its parts, columns the results and the differences of successive results.

    A cell computed over fewer tasks than the largest result shows their number. The last rows have the commonest answer
    of each role.
    """
    total = max(len(result.tasks) for result in results)
    parts = list(dict.fromkeys(part for result in results for part in result.parts))
    header = ["", *(result.label for result in results), *(f"{b.label} - {a.label}" for a, b in pairwise(results))]
    rows = [[part or "reward", *_cells(results, part, total)] for part in (None, *parts)]
    for role in dict.fromkeys(role for result in results for role in result.answers):
        cells = [str(result.answers.get(role, "-")) for result in results]
        rows.append([f"same answer, {role}", *cells, *[""] * (len(results) - 1)])
    conditions = f"mean over {total} tasks, 95 % bootstrap intervals; differences paired by task"
    return "\n".join([*stack([header, *rows]), conditions, *(line for result in results for line in result.doubts())])


def comparison_json(results: Sequence[EvalResult]) -> str:
    """Means of each result under its label, and paired differences with intervals under `<after> - <before>`.

    The bounds of an infinite interval are null, because JSON has no infinity.
    """
    report: dict[str, dict[str, Any]] = {}
    for result in results:
        means = {part: result.mean(part) for part in result.parts}
        report[result.label] = {"reward": result.mean(), "tasks": len(result.tasks), "failed": result.failed} | means
        report[result.label]["answers"] = {role: asdict(answers) for role, answers in result.answers.items()}
        report[result.label]["without_reward"] = result.without_reward
    for before, after in pairwise(results):
        parts = [None, *(part for part in after.parts if before.scores(part).keys() & after.scores(part).keys())]
        report[f"{after.label} - {before.label}"] = {
            part or "reward": _bounded(paired_difference(before.scores(part), after.scores(part))) for part in parts
        }
    return json.dumps(report, indent=1)


def _bounded(interval: Interval) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in asdict(interval).items()}


def _cells(results: Sequence[EvalResult], part: str | None, total: int) -> list[str]:
    scores = [result.scores(part) for result in results]
    means = [_mean_cell(mean_interval(list(score.values())), total) if score else "-" for score in scores]
    pairs = pairwise(scores)
    return means + [_change_cell(paired_difference(a, b), total) if a.keys() & b.keys() else "-" for a, b in pairs]


def _mean_cell(interval: Interval, total: int) -> str:
    return f"{interval.mean:.3f} ± {interval.half_width:.3f}{_count_suffix(interval, total)}"


def _change_cell(interval: Interval, total: int) -> str:
    return f"{interval.signed()}{_count_suffix(interval, total)}"


def _count_suffix(interval: Interval, total: int) -> str:
    return f" (n={interval.count})" if interval.count != total else ""
