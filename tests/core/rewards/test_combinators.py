"""Combinators: worked values, missing parts, and scorers that are sync, async or slow."""

import asyncio
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agl.errors import RewardError, TelemetryError
from agl.rewards import Cached, Clip, Gate, Normalise, Parts, Sequential, Weighted, read_score, scored


def gives(value: Any) -> Callable[[Any, Any], Any]:
    return lambda task, answer: value


def gives_async(value: Any) -> Callable[[Any, Any], Any]:
    async def score(task: Any, answer: Any) -> Any:
        await asyncio.sleep(0)
        return value

    return score


def fails(task: Any, answer: Any) -> float:
    raise ValueError(f"cannot read {answer}")


async def fails_async(task: Any, answer: Any) -> float:
    await asyncio.sleep(0)
    raise TimeoutError("busy")


PARTS = {"syntax": 1.0, "efficiency": 0.5, "goal": 0.0}
WEIGHTS = {"syntax": 0.3, "efficiency": 0.4, "goal": 0.3}


@pytest.mark.parametrize(
    "scorer", [gives(PARTS), gives_async(PARTS), {name: gives(part) for name, part in PARTS.items()}]
)
def test_weighted_is_the_weighted_sum_and_keeps_the_parts(scorer: Any) -> None:
    score = read_score(scored(Weighted(WEIGHTS, scorer), "task", "answer"))
    assert score.value == pytest.approx(0.3 * 1 + 0.4 * 0.5)
    assert score.parts == PARTS
    # Weights need not sum to 1, and a part of weight 0 is a metric.
    score = read_score(scored(Weighted({"syntax": 2.0, "efficiency": 4.0, "goal": 0.0}, scorer), "task", "answer"))
    assert (score.value, score.parts) == (4.0, PARTS)


@pytest.mark.parametrize("broken", [fails, fails_async, gives(None), gives("text"), gives(float("nan"))])
def test_a_part_that_is_missing_makes_the_reward_missing_unless_it_is_a_metric(broken: Any) -> None:
    scorers = {"goal": gives_async(1.0), "style": broken}
    score = read_score(scored(Weighted({"goal": 1.0, "style": 0.5}, scorers), "task", "answer"))
    assert score.value is None
    assert score.missing is not None and score.missing.startswith("parts are missing: style (")
    score = read_score(scored(Weighted({"goal": 1.0, "style": 0.0}, scorers), "task", "answer"))
    assert (score.value, score.parts) == (1.0, {"goal": 1.0})


def test_combinators_of_sync_scorers_are_sync() -> None:
    stack = Clip(0, 1, Gate({"goal": "syntax"}, Normalise(Cached(Sequential({"syntax": gives(1), "goal": gives(2)})))))
    assert not inspect.isawaitable(stack("task", "answer"))
    assert inspect.isawaitable(result := Clip(0, 1, gives_async(2.0))("task", "answer"))
    assert asyncio.run(asyncio.wait_for(result, 1)) == 1.0


@pytest.mark.parametrize(("passed", "expected"), [(1.0, {"fast": 0.7}), (0.99, {"fast": 0.0}), (None, {"fast": None})])
def test_a_gate_counts_a_part_only_if_another_passed(passed: float | None, expected: dict[str, float | None]) -> None:
    found = scored(Gate({"fast": "right"}, {"fast": gives(0.7), "right": gives(passed)}), "task", "answer")
    assert found == expected | {"right": passed}
    assert read_score(found).missing == (
        None if passed is not None else "parts are missing: fast (right is missing), right (the scorer returned None)"
    )


def test_gates_in_a_row_close_one_another() -> None:
    parts = {"compiles": 0.0, "right": 1.0, "fast": 0.5}
    found = scored(Gate({"right": "compiles", "fast": "right"}, gives(parts)), "task", "answer")
    assert found == {"compiles": 0.0, "right": 0.0, "fast": 0.0}


def test_a_gate_says_which_parts_there_are() -> None:
    with pytest.raises(RewardError, match="part 'rihgt'; the scorer returned fast, right"):
        scored(Gate({"fast": "rihgt"}, gives({"fast": 1, "right": 1})), "task", "answer")
    with pytest.raises(RewardError, match=r"Gate got 0.5 from its scorer, expected parts"):
        scored(Gate({"fast": "right"}, gives(0.5)), "task", "answer")


def test_a_sequence_stops_at_the_first_zero() -> None:
    seen: list[str] = []

    def noting(name: str, value: Any) -> Any:
        return lambda task, answer: (seen.append(name), value)[1]

    scorers = {"parses": noting("parses", 1.0), "runs": noting("runs", 0.0), "right": noting("right", 1.0)}
    assert scored(Sequential(scorers), "task", "answer") == {"parses": 1.0, "runs": 0.0, "right": 0.0}
    assert seen == ["parses", "runs"]
    found = scored(Sequential({"parses": gives_async(1.0), "runs": fails, "right": gives(1.0)}), "task", "answer")
    assert found == {"parses": 1.0, "runs": None, "right": None}
    assert "runs (ValueError: cannot read answer), right (runs is missing)" in str(read_score(found).missing)


def test_clip_limits_numbers_and_parts() -> None:
    assert [scored(Clip(-1, 1, gives(value)), "", "") for value in (-3, 0.5, 2, None)] == [-1, 0.5, 1, None]
    assert scored(Clip(0, 1, gives({"a": 3.0, "b": None})), "", "") == {"a": 1.0, "b": None}
    with pytest.raises(RewardError, match="1 to 0"):
        Clip(1, 0, gives(1))


def test_normalise_by_family_and_across_a_restart(tmp_path: Path) -> None:
    """Of 1, 3, 5: 0, then (3 - 2) / sqrt(2), then (5 - 3) / 2. Another family has statistics of its own."""
    path = tmp_path / "rewards.json"

    def score(value: float, family: str) -> Any:
        scorer = Normalise(lambda task, answer: {"part": answer}, family="family", path=path)
        return scored(scorer, {"family": family}, value)["part"]

    assert [score(value, "a") for value in (1.0, 3.0)] == pytest.approx([0.0, 2**-0.5])
    assert score(100.0, "b") == 0.0
    for broken in (float("nan"), float("inf")):  # Counted, they would make each later value NaN.
        with pytest.raises(TelemetryError, match="expected a finite number"):
            score(broken, "a")
    assert score(5.0, "a") == pytest.approx(1.0)
    with pytest.raises(RewardError, match="the task has no 'family', it is keys question"):
        scored(Normalise(gives(1.0), family="family"), {"question": "?"}, "")


def test_cached_keeps_results_but_not_missing_ones() -> None:
    results = iter([None, {"goal": None}, 0.5, 0.7, 0.9])
    scorer = Cached(lambda task, answer: next(results), size=1)
    found = [scored(scorer, {"id": 1}, answer) for answer in ("a", "a", "a", "a", "b", "a")]
    assert found == [None, {"goal": None}, 0.5, 0.5, 0.7, 0.9]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"goal": float("nan"), "style": 1}, "weight of 'goal' is nan"),
        ({}, "weights for nothing, expected parts goal, style"),
        ({"goal": 1}, "weights for goal, expected parts goal, style"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        Weighted(weights, {"goal": gives(1), "style": gives(1)})


def test_weights_of_parts_that_a_scorer_does_not_return() -> None:
    score = read_score(scored(Weighted({"goal": 1.0, "style": 1.0}, gives({"goal": 1.0})), "", ""))
    assert (score.value, score.missing) == (None, "parts are missing: style")


def test_the_configuration_may_weigh_what_others_add() -> None:
    assert read_score({"goal": 1.0}, {"goal": 0.5, "judge": 0.5}).value == 0.5


def test_only_one_of_scorer_and_configuration_weighs() -> None:
    assert read_score(Parts({"a": 1.0, "b": 0.0}), {"a": 0.2, "b": 0.8}).value == 0.2
    with pytest.raises(RewardError, match=r"the scorer weighs its parts \(a\), and so does `rewards`"):
        read_score(Parts({"a": 1.0}, {"a": 1.0}), {"a": 0.2})


@pytest.mark.parametrize(
    ("scorer", "expected"),
    [
        (lambda task: task, "task"),
        (lambda task, answer: answer, "answer"),
        (lambda task, answer, rollout: rollout, "rollout"),
        (lambda *arguments: len(arguments), 3),
        (lambda task, answer, *, strict=True: strict, True),
    ],
)
def test_a_scorer_gets_as_many_arguments_as_it_takes(scorer: Any, expected: Any) -> None:
    assert scored(scorer, "task", "answer", "rollout") == expected  # type: ignore[arg-type]
