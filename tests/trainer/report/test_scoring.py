"""Scores of tasks: parts of roles, failed rollouts, and pass@k compared with counting subsets."""

from itertools import combinations

import pytest

from agl import semconv
from agl.errors import ConfigError
from agl.runner.runner import Outcome
from agl.store import RolloutState
from agl_trainer.report.evaluation import Answers, TaskScore
from agl_trainer.report.scoring import (
    Sampling,
    commonest_answers,
    describe_missing,
    missing_rewards,
    pass_at_k,
    rollout_score,
    task_score,
)
from agl_trainer.report.step_metrics import answer_metrics
from tests.core.span_maker import reward, span
from tests.trainer.rollout_maker import call, reward_on, trajectory


def outcome(value: float | None = None, error: str | None = None, **parts: float) -> Outcome:
    return Outcome("r", RolloutState.FAILED if error else RolloutState.SUCCEEDED, error, None, value, parts)


@pytest.mark.parametrize(("samples", "solved", "k"), [(5, 2, 1), (5, 2, 3), (5, 0, 2), (5, 5, 2), (6, 4, 3), (4, 1, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_solution(samples: int, solved: int, k: int) -> None:
    subsets = list(combinations([place < solved for place in range(samples)], k))
    assert pass_at_k(samples, solved, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_a_task_is_the_mean_of_its_rollouts_and_a_failed_one_counts_0() -> None:
    scores = [
        TaskScore(1.0, {"goal": 1.0, "form": 0.5}),
        TaskScore(0.0, failed=1),
        TaskScore(0.5, {"goal": 0.0, "form": 1.0}),
    ]
    found = task_score(scores, ["goal", "form"], Sampling(3, pass_at=(1, 2), success=0.9))
    assert found.reward == pytest.approx(0.5) and found.failed == 1
    assert found.parts == pytest.approx({"goal": 1 / 3, "form": 0.5, "pass@1": 1 / 3, "pass@2": 2 / 3})
    assert task_score([TaskScore(1.0)], [], Sampling(2, pass_at=(1, 2))).parts == {"pass@1": 1.0}
    assert task_score([TaskScore(0.0, failed=1)], ["goal"], Sampling()) == TaskScore(0.0, {"goal": 0.0}, failed=1)


def test_rewards_of_roles_are_parts() -> None:
    of_role = reward(0.25, {semconv.ROLE: "writer", f"{semconv.REWARD_PREFIX}form": 0.5})
    made = trajectory("r", call("writer"), of_role, reward(0.8, {f"{semconv.REWARD_PREFIX}goal": 1.0}))
    assert rollout_score(outcome(), made) == TaskScore(0.8, {"goal": 1.0, "writer": 0.25, "writer/form": 0.5})
    by_function = rollout_score(outcome(0.5, goal=0.5), made)
    assert by_function == TaskScore(0.5, {"goal": 0.5, "writer": 0.25, "writer/form": 0.5})
    assert rollout_score(outcome(error="boom"), made) == TaskScore(0.0, failed=1)


def test_the_commonest_answer_is_among_the_last_ones_of_each_rollout() -> None:
    made = [
        trajectory("r1", call("writer", [5, 6]), call("writer", [7]), call("fixer", [7])),
        trajectory("r2", call("writer", [7])),
        trajectory("r3", call("writer", [5, 6])),
        trajectory("r4"),
    ]
    assert commonest_answers(made) == {"writer": Answers(3, 2), "fixer": Answers(1, 1)}
    assert answer_metrics(made) == {"writer/same_answer": pytest.approx(2 / 3), "fixer/same_answer": 1.0}


def test_a_rollout_without_a_reward_has_no_score() -> None:
    assert rollout_score(outcome(), trajectory("r", call("writer"))) is None


def test_meaningless_numbers_of_samples_are_rejected() -> None:
    with pytest.raises(ConfigError, match=r"4 samples of each task are the same at temperature 0; set train.eval"):
        Sampling(4).check(0.0)
    with pytest.raises(ConfigError, match=r"pass@8 needs 8 samples of each task or more, got 4"):
        Sampling(4, pass_at=(1, 8)).check(0.7)
    for samples in (0, -1):
        with pytest.raises(ConfigError, match=f"expected 1 sample of each task or more, got {samples}"):
            Sampling(samples).check(0.7)
    Sampling(4, pass_at=(1, 4)).check(0.7)
    Sampling(1, pass_at=(1,)).check(0.0)


def test_missing_rewards_are_those_of_this_runner_and_of_others() -> None:
    here = Outcome("r1", RolloutState.SUCCEEDED, missing="no reward within 3 s")
    elsewhere = trajectory("r2", call("writer"), span(semconv.SPAN_REWARD, {semconv.REWARD_MISSING: "OSError: away"}))
    rewarded = trajectory("r3", call("writer"), reward_on(None, 1.0))
    missing = missing_rewards([here, Outcome("r2", RolloutState.SUCCEEDED)], [elsewhere, rewarded])
    assert missing == {"r1": "no reward within 3 s", "r2": "OSError: away"}
    assert describe_missing(missing, 40) == "2 of 40 rewards are missing, 1 of them with: OSError: away"
    assert "More than 5 % are missing" in str(describe_missing(missing, 39))
    assert describe_missing({}, 3) is None
