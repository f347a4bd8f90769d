"""What each call of a rollout earned: outcome, role and call rewards, and the discount of hand-offs."""

from typing import Any

import pytest

from agl import semconv
from agl.span import Span
from agl_trainer.algo.credit import Credit, OverlongPenalty, call_credits, role_credit, undiscounted_credit
from tests.trainer.rollout_maker import call, reward_on, trajectory


def credits_of(*spans: Span, gamma: float = 0.5, **options: Any) -> list[float | None]:
    """Credits of the calls in the order of time."""
    made = trajectory("r", *spans)
    credits = call_credits(made, gamma, **options)
    return [credit.total if (credit := credits[call.span_id]) else None for call in made.calls]


def test_each_hand_off_after_a_call_discounts_the_reward_on_the_rollout() -> None:
    roles = ["planner", "planner", "executor", "executor", "planner"]
    calls = [call(role, response=[10 + place]) for place, role in enumerate(roles)]
    assert credits_of(*calls, reward_on(None, 8.0)) == [2.0, 2.0, 4.0, 4.0, 8.0]
    assert credits_of(*calls, reward_on(None, 8.0), gamma=1.0) == [8.0] * 5
    assert credits_of(*calls, reward_on(None, 8.0), gamma=0.0) == [0.0] * 4 + [8.0]


@pytest.mark.parametrize("gamma", [0.85, 0.9, 1.0])
def test_a_planner_an_executor_and_a_planner_again(gamma: float) -> None:
    calls = [call(role) for role in ("planner", "executor", "planner")]
    assert credits_of(*calls, reward_on(None, 1.0), gamma=gamma) == [gamma**2, gamma, 1.0]


@pytest.mark.parametrize("value", [-8.0, 0.0])
def test_a_late_mistake_is_no_better_than_an_early_one(value: float) -> None:
    """A discount would leave the planner -2 of the -8 of a mistake that three more hand-offs delayed."""
    early = [call("planner"), call("executor")]
    late = [call("planner"), call("executor"), call("planner"), call("executor")]
    assert credits_of(*early, reward_on(None, value), turn_gamma=0.5) == [value] * 2
    assert credits_of(*late, reward_on(None, value), turn_gamma=0.5) == [value] * 4


def test_turns_may_be_discounted_too() -> None:
    calls = [call(role) for role in ("planner", "planner", "executor")]
    found = credits_of(*calls, reward_on(None, 8.0), turn_gamma=0.5)
    assert found == [8 * 0.5 * 0.5**2, 8 * 0.5 * 0.5, 8.0]


def test_a_role_may_weigh_the_parts_of_a_reward_in_its_own_way() -> None:
    calls = [call("planner"), call("executor")]
    parts = reward_on(None, 0.5)
    parts.attributes.update({"agl.reward.goal": 1.0, "agl.reward.brevity": 0.0})
    weights = {"planner": {"goal": 0.75, "brevity": 0.25}}
    assert credits_of(*calls, parts, gamma=1.0, weights=weights) == [0.75, 0.5]
    assert credits_of(*calls, parts, gamma=1.0, weights={"planner": {"brevity": 2.0}}) == [0.0, 0.5]
    assert credits_of(*calls, parts, gamma=1.0, weights={"planner": {"style": 1.0}}) == [0.0, 0.5]


@pytest.mark.parametrize(("length", "penalty"), [(1, 0.0), (4, 0.0), (6, -0.25), (8, -0.5), (9, -0.5)])
def test_an_answer_that_is_too_long_loses_by_its_length(length: int, penalty: float) -> None:
    long = call("planner", [7] * length)
    found = credits_of(long, call("planner"), reward_on(None, 1.0), overlong=OverlongPenalty(8, 4, 0.5))
    assert found == [1.0 + penalty, 1.0]


def test_an_answer_that_was_cut_loses_all() -> None:
    cut = call("planner", **{semconv.GEN_AI_RESPONSE_FINISH_REASONS: ["length"]})
    assert credits_of(cut, reward_on(None, 1.0), overlong=OverlongPenalty(8, 4)) == [0.0]


def test_a_role_with_a_reward_of_its_own_takes_that_one_undiscounted() -> None:
    calls = [call("planner", [10]), call("executor", [11]), call("planner", [12])]
    rewards = reward_on(None, 8.0), reward_on(None, 3.0, role="planner")
    assert credits_of(*calls, *rewards) == [3.0, 4.0, 3.0]


def test_a_reward_on_a_call_is_added_to_that_call_alone() -> None:
    calls = [call("planner", [10]), call("executor", [11]), call("executor", [12])]
    on_call = reward_on(calls[1], 0.25), reward_on(calls[1], -1.0)
    assert credits_of(*calls, *on_call, reward_on(None, 8.0)) == [4.0, 7.25, 8.0]
    assert credits_of(*calls, *on_call, reward_on(None, 3.0, role="executor")) == [None, 2.25, 3.0]


def test_a_call_that_no_reward_reaches_has_no_credit() -> None:
    calls = [call("planner", [10]), call("executor", [11])]
    assert credits_of(*calls) == [None, None]
    assert credits_of(*calls, reward_on(None, 1.0, role="executor")) == [None, 1.0]
    assert credits_of(*calls, reward_on(calls[0], 0.0)) == [0.0, None]


def test_the_last_reward_on_the_whole_counts() -> None:
    early = reward_on(None, 1.0)
    assert credits_of(early, call("planner"), reward_on(None, 0.0)) == [0.0]


def test_a_reward_may_name_a_call_by_its_response() -> None:
    one, other = (call("planner", [n], **{semconv.GEN_AI_RESPONSE_ID: f"chatcmpl-{n}"}) for n in (10, 11))
    reward = reward_on(None, 5.0)
    reward.attributes[semconv.REWARD_TARGET] = "chatcmpl-11"
    assert credits_of(one, other, reward) == [None, 5.0]


def test_calls_of_an_earlier_attempt_have_no_part_in_it() -> None:
    old = call("executor", [9], **{semconv.ATTEMPT_ID: "r-a0"})
    made = trajectory("r", call("planner", [10]), old, call("planner", [11]), reward_on(None, 1.0))
    assert [credit.total for credit in call_credits(made, 0.5).values() if credit] == [1.0, 1.0]


def test_the_credit_of_a_role_is_the_mean_of_its_calls() -> None:
    credits = [Credit(1.0, 0.0), Credit(3.0, 0.5, 0.5), Credit(5.0, 1.0)]
    assert role_credit(credits) == pytest.approx(3.0)
    assert undiscounted_credit(credits) == pytest.approx(3.5)
