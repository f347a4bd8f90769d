"""Metrics of a step, for hand-written rollouts."""

import pytest

from agl import semconv
from agl_trainer.algo.batch_builder import grpo_batch
from agl_trainer.algo.options import RoleState
from agl_trainer.compute.optimizer_step import StepStats
from agl_trainer.report.step_metrics import Stopwatch, batch_metrics, reward_metrics, update_metrics
from tests.core.span_maker import reward
from tests.trainer.rollout_maker import batch_options, call, reward_on, trajectory


def test_rewards_by_rollout_role_and_part() -> None:
    def goal(value: float, part: float, **named: str):
        return reward(value, {f"{semconv.REWARD_PREFIX}goal": part, **named})

    made = [
        trajectory("r1", call("writer"), goal(0.2, 0.0), goal(1.0, 1.0), goal(0.4, 0.5, **{semconv.ROLE: "writer"})),
        trajectory("r2", call("writer"), goal(0.0, 0.5)),
        trajectory("r3", call("writer"), reward(1.0, {semconv.REWARD_TARGET: "elsewhere"})),
    ]
    # The last reward of each counts, and a rollout without one is no 0.
    assert reward_metrics(made) == pytest.approx(
        {
            "reward/mean": 0.5,
            "reward/std": 0.5,
            "reward/goal": 0.75,
            "reward/goal_std": 0.25,
            "writer/reward/mean": 0.4,
            "writer/reward/std": 0.0,
            "writer/reward/goal": 0.5,
            "writer/reward/goal_std": 0.0,
            "rewards/without_call": 1.0,
        }
    )
    assert reward_metrics([]) == {"rewards/without_call": 0.0}


def test_lengths_staleness_and_credit_of_a_role() -> None:
    long = call("writer", [3] * 6, **{semconv.GEN_AI_RESPONSE_FINISH_REASONS: ["length"]})
    older = call("writer", [3, 4], **{semconv.POLICY_VERSION: "writer@2"})
    made = [trajectory("r1", long, reward_on(None, 1.0)), trajectory("r2", older, reward_on(None, 0.0))]
    roles = {"writer": RoleState(version=3)}
    batch = grpo_batch(made, roles, batch_options(scale_rewards="none"))
    assert batch_metrics(batch, roles) == pytest.approx(
        {
            "writer/credit_mean": 0.5,
            "writer/credit_std": 0.5,
            "writer/prompt_tokens_mean": 2.0,
            "writer/response_tokens_mean": 4.0,
            "writer/response_tokens_min": 2.0,
            "writer/response_tokens_max": 6.0,
            "writer/truncated": 0.5,
            "writer/staleness_mean": 2.0,
            "writer/staleness_max": 3.0,
        }
    )


def test_update_metrics_include_tokens_and_speed() -> None:
    updates = {"writer": StepStats({"loss": 0.5}, 10, 40), "fixer": StepStats({"loss": 1.5}, 5, 10)}
    assert update_metrics(updates, 2.0) == {
        "writer/loss": 0.5,
        "fixer/loss": 1.5,
        "tokens/distinct": 15.0,
        "tokens/total": 50.0,
        "tokens/trained_per_s": 25.0,
    }


def test_the_laps_of_a_step_add_up_to_its_time() -> None:
    clock = Stopwatch()
    for name in ("rollouts", "update"):
        clock.lap(name)
    assert list(clock.metrics()) == ["time/rollouts_s", "time/update_s"]
    assert all(seconds > 0 for seconds in clock.metrics().values())
