"""Combinators: scorers made of scorers. They are sync if all of their scorers are."""

import json
import math
import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from agl.emit.reward import weighted_sum
from agl.errors import RewardError
from agl.rewards.score import Parts, ScoredRollout, Scorer, call_scorer, read_score, run_steps

Steps = Generator[Any, Any, Any]


class Combinator(ABC):
    """A scorer whose `_steps` yields calls of scorers and gets their results."""

    def __call__(self, task: Any, answer: Any, rollout: ScoredRollout | None = None) -> Any:
        return run_steps(self._steps(task, answer, rollout))

    @abstractmethod
    def _steps(self, task: Any, answer: Any, rollout: ScoredRollout | None) -> Steps: ...


class Weighted(Combinator):
    """Weighs the parts of `scorer`: the reward is their weighted sum. A part of weight 0 is a metric.

        Weighted({"syntax": 0.3, "goal": 0.7}, {"syntax": parses, "goal": solves})

    Weights need not sum to 1. Every part needs one, and every weight a part.
    """

    def __init__(self, weights: Mapping[str, float], scorer: Scorer) -> None:
        """Raises RewardError for weights that are not numbers, or that do not fit to a mapping of scorers."""
        if wrong := [name for name, weight in weights.items() if not math.isfinite(weight)]:
            raise RewardError(f"the weight of {wrong[0]!r} is {weights[wrong[0]]}, expected a finite number")
        if not weights or (isinstance(scorer, Mapping) and weights.keys() != scorer.keys()):
            parts = f"parts {', '.join(scorer)}" if isinstance(scorer, Mapping) else "at least one"
            raise RewardError(f"Weighted has weights for {', '.join(weights) or 'nothing'}, expected {parts}")
        self.weights = dict(weights)
        self.scorer = scorer

    def _steps(self, task: Any, answer: Any, rollout: ScoredRollout | None) -> Steps:
        parts = _parts_of((yield call_scorer(self.scorer, task, answer, rollout)), "Weighted")
        if parts is None:
            return None
        weighted_sum({name: 0.0 for name in parts}, self.weights)  # raises for a part without a weight
        return Parts(parts, self.weights, parts.reasons)


class Gate(Combinator):
    """A part counts, else it is 0, only if another part reached `at_least`.

        Gate({"efficiency": "goal"}, scorer)    # efficiency counts only for a right answer

    The part is missing if the other one is. Gates apply in their order, so a part that one of them set to 0 opens no
    later one.
    """

    def __init__(self, requires: Mapping[str, str], scorer: Scorer, *, at_least: float = 1.0) -> None:
        self.requires = dict(requires)
        self.scorer = scorer
        self.at_least = at_least

    def _steps(self, task: Any, answer: Any, rollout: ScoredRollout | None) -> Steps:
        parts = _parts_of((yield call_scorer(self.scorer, task, answer, rollout)), "Gate")
        if parts is None:
            return None
        values, reasons = dict(parts), dict(parts.reasons)
        for part, other in self.requires.items():
            if unknown := {part, other} - parts.keys():
                raise RewardError(f"Gate names part {min(unknown)!r}; the scorer returned {', '.join(parts)}")
            passed = values[other]
            if passed is None:
                values[part], reasons[part] = None, f"{other} is missing"
            elif passed < self.at_least:
                values[part] = 0.0
        return Parts(values, parts.weights, reasons)


class Sequential(Combinator):
    """Runs `scorers` in their order, each a part, and stops at the first that is 0 or less: the later parts are 0.

        Sequential({"compiles": compiles, "passes": passes})    # passes runs only on what compiles

    After a missing part the later ones are missing too.
    """

    def __init__(self, scorers: Mapping[str, Scorer]) -> None:
        self.scorers = dict(scorers)

    def _steps(self, task: Any, answer: Any, rollout: ScoredRollout | None) -> Steps:
        values: dict[str, float | None] = dict.fromkeys(self.scorers, 0.0)
        reasons: dict[str, str] = {}
        for name, scorer in self.scorers.items():
            part = Parts.of((yield call_scorer({name: scorer}, task, answer, rollout)))
            value, reasons = part[name], reasons | dict(part.reasons)
            if value is None:
                later = [*self.scorers][[*self.scorers].index(name) :]
                values |= dict.fromkeys(later)
                reasons |= {each: f"{name} is missing" for each in later if each != name}
                break
            values[name] = value
            if value <= 0:
                break
        return Parts(values, reasons=reasons)


class Clip(Combinator):
    """Limits a number, or each part, to `low` to `high`."""

    def __init__(self, low: float, high: float, scorer: Scorer) -> None:
        if not low < high:
            raise RewardError(f"Clip has the range {low:g} to {high:g}, expected the lower number first")
        self.low, self.high = low, high
        self.scorer = scorer

    def _steps(self, task: Any, answer: Any, rollout: ScoredRollout | None) -> Steps:
        result = yield call_scorer(self.scorer, task, answer, rollout)
        return _each(result, lambda _, value: min(max(value, self.low), self.high))


class Normalise(Combinator):
    """A number, or each part, minus the mean of all so far, divided by their standard deviation, by task family.

    `family` is the function or the key of the task that names its family; None: one family. The first value of a family
    is 0. Results depend on the order of the rollouts. `path`: a file that keeps the statistics across restarts; two
    processes must not share it.
    """

    def __init__(
        self, scorer: Scorer, *, family: Callable[[Any], Any] | str | None = None, path: str | Path | None = None
    ) -> None:
        self.scorer = scorer
        self.family = family
        self._path = Path(path) if path else None
        self._lock = threading.Lock()
        self._seen: dict[str, list[float]] = {}
        if self._path and self._path.exists():
            self._seen = json.loads(self._path.read_text(encoding="utf-8"))

    def _steps(self, task: Any, answer: Any, rollout: ScoredRollout | None) -> Steps:
        result = yield call_scorer(self.scorer, task, answer, rollout)
        family = "" if self.family is None else find(task, self.family, "task")
        with self._lock:
            normal = _each(result, lambda name, value: self._normal(json.dumps([family, name], default=str), value))
            if self._path:
                half = self._path.with_name(self._path.name + ".new")
                half.write_text(json.dumps(self._seen), encoding="utf-8")
                os.replace(half, self._path)
        return normal

    def _normal(self, key: str, value: float) -> float:
        """Count `value`, and normalise it (Welford's algorithm: number, mean, sum of squared differences)."""
        number, mean, squares = self._seen.get(key, (0.0, 0.0, 0.0))
        number += 1
        new_mean = mean + (value - mean) / number
        squares += (value - mean) * (value - new_mean)
        self._seen[key] = [number, new_mean, squares]
        deviation = math.sqrt(squares / (number - 1)) if number > 1 else 0.0
        return (value - new_mean) / deviation if deviation else 0.0


class Cached(Combinator):
    """Keeps the results of `scorer` for the last `size` pairs of task and answer; not those that are missing."""

    def __init__(self, scorer: Scorer, *, size: int = 10_000) -> None:
        self.scorer = scorer
        self.size = size
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Any] = OrderedDict()

    def _steps(self, task: Any, answer: Any, rollout: ScoredRollout | None) -> Steps:
        key = json.dumps([task, answer], sort_keys=True, default=repr)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        result = yield call_scorer(self.scorer, task, answer, rollout)
        if result is None or (isinstance(result, Mapping) and None in result.values()):
            return result
        with self._lock:
            self._kept[key] = result
            while len(self._kept) > self.size:
                self._kept.popitem(last=False)
        return result


def find(value: Any, where: Callable[[Any], Any] | str | None, name: str) -> Any:
    """The part of `value` that a function or a key finds; None: all of it. Raises RewardError if it has no such key."""
    if where is None:
        return value
    if callable(where):
        return where(value)
    if not isinstance(value, Mapping) or where not in value:
        keys = f"keys {', '.join(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__
        raise RewardError(f"the {name} has no {where!r}, it is {keys}; name another key, or pass a function")
    return value[where]


def _parts_of(result: Any, combinator: str) -> Parts | None:
    """The parts of a result; None if it is missing. Raises RewardError for a number."""
    if result is None:
        return None
    if not isinstance(result, Mapping):
        raise RewardError(f"{combinator} got {result!r} from its scorer, expected parts, {{name: number}}")
    return Parts.of(result)


def _each(result: Any, function: Callable[[str, float], float]) -> Any:
    """A result with `function` of the name and value of each part, or of "" and the number. Raises TelemetryError for
    what is no finite number.
    """

    def changed(name: str, value: Any) -> float | None:
        number = read_score(value).value
        return None if number is None else function(name, number)

    if not isinstance(result, Mapping):
        return changed("", result)
    parts = Parts.of(result)
    return parts.with_values({name: changed(name, part) for name, part in parts.items()})
