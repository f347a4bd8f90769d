"""Failed rollouts of a step: left out of their group, or members with a reward."""

import math
from collections.abc import Sequence

import pytest

from agl import semconv
from agl.runner.runner import Outcome
from agl.span import Span
from agl.store import RolloutState
from agl.trajectory import Trajectory
from agl_trainer.algo.options import BatchOptions, RoleState
from agl_trainer.loop.step_rollouts import StepRollouts, draw_rollouts
from agl_trainer.report.step_metrics import Stopwatch, reward_metrics
from agl_trainer.rollout.sources import RolloutBatch
from tests.core.span_maker import span
from tests.trainer.rollout_maker import call, reward_on, trajectory


class ListedSource:
    """Supplies these trajectories, with an outcome for each."""

    def __init__(self, trajectories: Sequence[Trajectory]) -> None:
        outcomes = [Outcome(one.rollout_id, RolloutState.SUCCEEDED, one.error) for one in trajectories]
        self.batch = RolloutBatch(outcomes, list(trajectories))

    def draw(self, step: int, position: int, groups: range) -> RolloutBatch:
        return self.batch

    def prefetch(self, step: int) -> None:
        pass


def drawn(trajectories: Sequence[Trajectory], failed_reward: float | None) -> StepRollouts:
    return draw_rollouts(
        ListedSource(trajectories),
        0,
        0,
        1,
        replacements=0,
        roles={"writer": RoleState()},
        options=BatchOptions(),
        clock=Stopwatch(),
        failed_reward=failed_reward,
    )


def good(number: int) -> Trajectory:
    return trajectory(f"good{number}", call("writer"), reward_on(None, 1.0))


def bad(number: int, *spans: Span) -> Trajectory:
    """Its agent failed after it had rewarded itself."""
    return trajectory(f"bad{number}", call("writer"), *spans, reward_on(None, 1.0), failed=True)


def failed_call() -> Span:
    made = call("writer")
    return span(made.name, {**made.attributes, semconv.HTTP_RESPONSE_STATUS_CODE: 503}, status="error", message="503")


def test_eight_rollouts_of_which_four_fail_have_a_gradient_with_failed_reward() -> None:
    made = [good(number) for number in range(4)] + [bad(number) for number in range(4)]
    assert drawn(made, None).batch.dropped() == {"zero_advantage": 4, "failed_rollout": 4}
    step = drawn(made, 0.0)
    # Mean 0.5, standard deviation sqrt(8 * 0.25 / 7).
    advantage = 0.5 / (math.sqrt(2 / 7) + 1e-4)
    assert [one.advantage for one in step.batch.outcomes] == pytest.approx([advantage] * 4 + [-advantage] * 4)
    assert reward_metrics(step.trajectories)["reward/mean"] == 0.5
    assert step.metrics()["rollouts/failed"] == 4.0


def test_a_rollout_whose_engine_failed_is_no_member_of_its_group() -> None:
    made = [good(0), bad(0), bad(1, failed_call())]
    assert [one.failed_by_agent for one in made] == [False, True, False]
    step = drawn(made, 0.0)
    assert step.batch.dropped() == {"failed_rollout": 1, "failed_call": 1}
    assert [one.advantage for one in step.batch.outcomes if one.reason is None] == pytest.approx(
        [0.5 / (math.sqrt(0.5) + 1e-4), -0.5 / (math.sqrt(0.5) + 1e-4)]
    )


def test_the_commonest_error_is_reported_if_more_than_a_tenth_fail() -> None:
    made = [good(number) for number in range(9)] + [bad(0)]
    assert drawn(made, None).many_failures() is None
    assert drawn([*made, bad(1)], None).many_failures() == "2 of 11 rollouts failed, 2 of them with: boom"
    assert drawn([], None).many_failures() is None
