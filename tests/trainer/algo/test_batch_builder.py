"""The batch of a step: plain GRPO for one role and reward, weights by rollout, and an outcome for every call."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agl import semconv
from agl.config import PolicyLossConfig
from agl.span import Span
from agl.trajectory import DropReason, Trajectory
from agl_trainer.algo.advantages import group_advantages
from agl_trainer.algo.batch import CallOutcome, GrpoBatch
from agl_trainer.algo.batch_builder import grpo_batch
from agl_trainer.algo.losses import policy_loss
from agl_trainer.algo.objective import Objective
from agl_trainer.algo.options import BatchOptions, RoleState
from agl_trainer.algo.rejection import Rejection
from agl_trainer.data.rows import RowLogprobs
from agl_trainer.data.truncation import Truncation
from tests.core.span_maker import chat, gateway_call
from tests.trainer.rollout_maker import batch_options, call, reward_on, trajectory


def batch_of(*trajectories: Trajectory, roles: Sequence[str] = ("writer", "fixer"), **options: Any) -> GrpoBatch:
    states = {role: RoleState() for role in roles}
    return grpo_batch(trajectories, states, batch_options(**({"scale_rewards": "none"} | options)))


def single(rollout_id: str, value: float | None, response: Sequence[int] = (3, 4), group_id: str = "g") -> Trajectory:
    """A rollout of one call, with its reward."""
    rewards = [] if value is None else [reward_on(None, value)]
    return trajectory(rollout_id, call("writer", response), *rewards, group_id=group_id)


def advantages(batch: GrpoBatch, role: str) -> list[float | None]:
    return [outcome.advantage for outcome in batch.outcomes if outcome.call.role == role]


def reasons(batch: GrpoBatch) -> list[str | None]:
    return [outcome.reason for outcome in batch.outcomes]


# --- advantages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.2, 0.05])
def test_one_role_one_reward_and_gamma_one_is_plain_grpo(epsilon: float) -> None:
    """The loss of arXiv 2402.03300, eq. 3 (without KL), and its gradient, written out for two groups."""
    rewards = {"g": [1.0, 0.0, 0.5, 0.25], "h": [0.0, 0.0, 1.0, 0.0]}
    lengths = {"g": [3, 1, 5, 2], "h": [4, 4, 1, 2]}
    made = [
        single(f"{group}{i}", value, range(10, 10 + lengths[group][i]), group)
        for group in rewards
        for i, value in enumerate(rewards[group])
    ]
    batch = batch_of(*made, scale_rewards="group")
    rows = batch.rows["writer"]
    generator = torch.Generator().manual_seed(0)
    longest = max(sum(row.loss_mask) for row in rows)
    mask = torch.tensor([[place < sum(row.loss_mask) for place in range(longest)] for row in rows])
    logprobs = (-0.5 + 0.3 * torch.randn(mask.shape, generator=generator)).requires_grad_()
    result = RowLogprobs(logprobs * mask, torch.zeros_like(logprobs), mask, 0)
    loss, _ = Objective(PolicyLossConfig(epsilon=epsilon))(result, rows)
    (gradient,) = torch.autograd.grad(loss, logprobs)

    plain, expected = torch.zeros(()), []
    for place, (group, i) in enumerate((group, i) for group in rewards for i in range(4)):
        values = torch.tensor(rewards[group], dtype=torch.float64)
        expected.append(((values[i] - values.mean()) / (values.std() + 1e-4)).item())
        ratio = (logprobs[place, : lengths[group][i]] - -0.5).exp()
        terms = torch.minimum(ratio * expected[-1], ratio.clamp(1 - epsilon, 1 + epsilon) * expected[-1])
        plain = plain - terms.mean() / 8
    (plain_gradient,) = torch.autograd.grad(plain, logprobs)
    assert advantages(batch, "writer") == expected
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert torch.allclose(gradient, plain_gradient, rtol=1e-5, atol=1e-8)
    assert (gradient[mask] == 0).any() and (gradient[mask] != 0).any()


def test_it_equals_grpo_to_the_last_bit() -> None:
    """Against `policy_loss` with TRL's normalisation of grpo on advantages computed by hand: loss and gradient."""
    rewards = [0.3, 0.7, 0.1, 0.9, 0.2, 0.2, 1.0, 0.6]
    made = [single(f"r{i}", value, range(10, 11 + i % 4), "gh"[i // 4]) for i, value in enumerate(rewards)]
    rows = batch_of(*made, scale_rewards="group").rows["writer"]
    by_hand = []
    for group in (torch.tensor(rewards[:4], dtype=torch.float64), torch.tensor(rewards[4:], dtype=torch.float64)):
        by_hand += ((group - group.mean()) / (group.std() + 1e-4)).tolist()
    mask = torch.tensor([[place < sum(row.loss_mask) for place in range(4)] for row in rows])
    logprobs = (-0.5 + 0.3 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
    ours, _ = Objective(PolicyLossConfig())(RowLogprobs(logprobs * mask, logprobs * 0, mask, 0), rows)
    plain, _ = policy_loss("grpo", logprobs, torch.full(mask.shape, -0.5), torch.tensor(by_hand), mask)
    assert ours.item() == plain.item() != 0
    assert torch.equal(*(torch.autograd.grad(loss, logprobs)[0] for loss in (ours, plain)))


def test_roles_compete_with_their_like_and_a_hand_off_is_discounted() -> None:
    def team(rollout_id: str, value: float) -> Trajectory:
        return trajectory(rollout_id, call("writer", [10]), call("fixer", [11]), reward_on(None, value))

    batch = batch_of(team("r1", 1.0), team("r2", 0.0), gamma=0.5)
    assert advantages(batch, "writer") == [0.25, -0.25]
    assert advantages(batch, "fixer") == [0.5, -0.5]


def test_a_rollout_without_the_role_is_no_member_of_its_group() -> None:
    both = trajectory("r1", call("writer", [10]), call("fixer", [11]), reward_on(None, 1.0))
    fixed = trajectory("r2", call("writer", [10]), call("fixer", [11]), reward_on(None, 0.5))
    batch = batch_of(both, fixed, single("r3", 0.0))
    assert advantages(batch, "fixer") == [0.25, -0.25]
    assert advantages(batch, "writer") == [0.5, None, -0.5]


def test_groups_have_baselines_of_their_own() -> None:
    made = [single("a1", 9.0, group_id="a"), single("b1", 1.0, group_id="b")]
    made += [single("a2", 7.0, group_id="a"), single("b2", 0.0, group_id="b")]
    assert advantages(batch_of(*made), "writer") == [1.0, 0.5, -1.0, -0.5]


def test_a_role_with_its_own_reward_is_judged_by_it() -> None:
    def judged(rollout_id: str, value: float, of_fixer: float) -> Trajectory:
        rewards = reward_on(None, value), reward_on(None, of_fixer, role="fixer")
        return trajectory(rollout_id, call("writer", [10]), call("fixer", [11]), *rewards)

    batch = batch_of(judged("r1", 1.0, 0.0), judged("r2", 0.0, 4.0), gamma=0.5)
    assert advantages(batch, "writer") == [0.25, -0.25]
    assert advantages(batch, "fixer") == [-2.0, 2.0]


def test_a_reward_on_a_call_sets_only_its_tokens_apart() -> None:
    """Two turns of one row: the second, praised, has another advantage than the first."""
    turns = call("writer", [3], prompt=[1]), call("writer", [5, 6], prompt=[1, 3, 4])
    praised = trajectory("r1", *turns, reward_on(None, 1.0), reward_on(turns[1], 0.5))
    batch = batch_of(praised, single("r2", 0.0, [9]))
    # Credits 1.0 and 1.5 make the rollout 1.25, and 1.25 / 2 the baseline.
    assert advantages(batch, "writer") == [0.375, 0.875, -0.625]
    row = batch.rows["writer"][0]
    assert list(row.token_ids) == [1, 3, 4, 5, 6]
    assert list(row.loss_mask) == [0, 1, 0, 1, 1]
    assert list(row.advantages) == [0.0, 0.375, 0.0, 0.875, 0.875]
    assert list(row.logprobs) == [0.0, -0.5, 0.0, -0.5, -0.5]


def test_a_rollout_of_many_calls_and_rows_weighs_as_one() -> None:
    forks = [call("writer", [20 + i] * (i + 1), prompt=[7, i]) for i in range(3)]
    turns = call("writer", [3], prompt=[1]), call("writer", [5, 6], prompt=[1, 3, 4])
    many = trajectory("many", *forks, *turns, reward_on(None, 1.0))
    batch = batch_of(many, single("one", 0.0, [8]), single("two", 0.5, [8, 8]))
    rows = batch.rows["writer"]
    assert [len(row.token_ids) for row in rows] == [3, 4, 5, 5, 3]
    share = [row.weight * sum(row.loss_mask) for row in rows]
    assert [sum(share[:4]), share[4]] == pytest.approx([1 / 3, 1 / 3])
    assert len({row.weight for row in rows[:4]}) == 1
    # "two" has the mean reward: it does not train, but it counts among the rollouts.
    assert batch.outcomes[-1] == CallOutcome(batch.outcomes[-1].call, None, DropReason.ZERO_ADVANTAGE)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_discount_alone_tells_no_rollouts_apart(scale: str) -> None:
    """Rollouts of one reward and one way have nothing to learn from, though their calls are discounted differently."""
    calls = [[call("writer", [10]), call("fixer", [11]), call("writer", [12])] for _ in range(2)]
    made = [trajectory(f"r{i}", *own, reward_on(None, 1.0)) for i, own in enumerate(calls)]
    assert advantages(batch_of(*made, gamma=0.5, scale_rewards=scale), "writer") == [None] * 4


def test_gdpo_does_not_magnify_a_difference_of_discounts() -> None:
    roles = [["writer"]] * 7 + [["writer", "fixer", "judge"]]
    made = [trajectory(f"r{i}", *map(call, names), reward_on(None, 1.0)) for i, names in enumerate(roles)]
    found = advantages(batch_of(*made, gamma=0.85, advantage="gdpo", scale_rewards="group"), "writer")
    difference = 1 - 0.85**2
    assert found == pytest.approx([difference / 8] * 7 + [-difference * 7 / 8])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_shorter_way_is_preferred_by_its_discount_at_its_natural_size(scale: str) -> None:
    """All earned 1; the last took two more hand-offs, which cost its writer 1 - 0.85^2 = 0.28."""

    def team(index: int) -> Trajectory:
        roles = ["writer"] if index < 7 else ["writer", "fixer", "judge"]
        return trajectory(f"r{index}", *(call(role) for role in roles), reward_on(None, 1.0))

    found = advantages(batch_of(*map(team, range(8)), gamma=0.85, scale_rewards=scale), "writer")
    difference = 1 - 0.85**2
    assert found == pytest.approx([difference / 8] * 7 + [-difference * 7 / 8])


def test_calls_share_the_advantage_by_their_discounts() -> None:
    def team(rollout_id: str, value: float) -> Trajectory:
        calls = [call("writer", [10]), call("fixer", [11]), call("writer", [12])]
        return trajectory(rollout_id, *calls, reward_on(None, value))

    # Credits 0.25 and 1: 0.625 and 0 for the rollouts, so 0.3125 for the better one, in parts of 2/5 and 8/5.
    found = advantages(batch_of(team("r1", 1.0), team("r2", 0.0), gamma=0.5), "writer")
    assert found == pytest.approx([0.125, 0.5, -0.125, -0.5])


def test_rewards_on_calls_are_scaled_by_what_they_differ() -> None:
    """Where rollouts earn the same as a whole, their calls still differ; division by nearly 0 is no measure of it."""

    def judged(rollout_id: str) -> Trajectory:
        turns = call("writer", [3], prompt=[1]), call("writer", [5], prompt=[1, 3, 4])
        return trajectory(rollout_id, *turns, reward_on(turns[0], 0.25), reward_on(turns[1], 0.75))

    found = advantages(batch_of(judged("r1"), judged("r2"), scale_rewards="group"), "writer")
    assert found == pytest.approx([-1.0, 1.0] * 2, rel=1e-3)


def parts_on(target: Span | None, **parts: float) -> Span:
    made = reward_on(target, sum(parts.values()))
    made.attributes.update({semconv.REWARD_PREFIX + name: value for name, value in parts.items()})
    return made


def test_gdpo_compares_each_dimension_of_a_role_by_itself() -> None:
    """For rollouts of one call it is `group_advantages`, also where a dimension is missing or has the weight 0."""
    nan = math.nan
    values = [[1.0, 0.2, 7.0], [0.0, nan, 1.0], [0.5, 0.1, 2.0], [1.0, 0.3, 0.0], [1.0, 0.3, 5.0]]
    names, groups, weights = ("goal", "style", "metric"), "aaabb", {"goal": 1.0, "style": 0.5, "metric": 0.0}
    made = [
        trajectory(
            f"r{index}",
            call("writer"),
            parts_on(None, **{name: part for name, part in zip(names, row, strict=True) if not math.isnan(part)}),
            group_id=groups[index],
        )
        for index, row in enumerate(values)
    ]
    options = batch_options(advantage="gdpo", reward_weights=weights)
    batch = grpo_batch(made, {"writer": RoleState()}, options)
    expected = group_advantages(
        "gdpo", torch.tensor(values, dtype=torch.float64), groups, weights=list(weights.values())
    ).tolist()
    assert advantages(batch, "writer") == [*(pytest.approx(value, rel=1e-12) for value in expected[:3]), None, None]
    assert batch.zero_variance_groups == ["b"]
    # The role's own weights replace those of the configuration.
    batch = grpo_batch(made, {"writer": RoleState(weights={"metric": 1.0})}, options)
    expected = group_advantages("gdpo", torch.tensor(values, dtype=torch.float64)[:, 2], groups).tolist()
    assert advantages(batch, "writer") == pytest.approx(expected, rel=1e-12)


def test_gdpo_of_calls() -> None:
    """A reward on a call, a discount and the penalty of overlong responses, each in its own dimension."""

    def judged(rollout_id: str, goal: float, style: float) -> Trajectory:
        turns = call("writer", [3], prompt=[1]), call("writer", [5], prompt=[1, 3, 4])
        return trajectory(rollout_id, *turns, parts_on(None, goal=goal), parts_on(turns[1], style=style))

    made = [judged("r1", 1.0, 0.0), judged("r2", 0.0, 0.5)]
    found = advantages(batch_of(*made, advantage="gdpo", scale_rewards="group"), "writer")
    goal, style = (0.5 * size / (size * math.sqrt(0.5) + 1e-4) for size in (1.0, 0.5))
    # Only the second call has a style. Each rollout's is goal - style or its negative.
    divisor = math.sqrt(2) * (goal - style) + 1e-4
    assert found == pytest.approx([goal / divisor, (goal - style) / divisor, -goal / divisor, (style - goal) / divisor])
    long = call("writer", range(10, 14)), call("writer", [10])
    made = [trajectory(f"r{index}", each, reward_on(None, 1.0)) for index, each in enumerate(long)]
    batch = batch_of(*made, advantage="gdpo", scale_rewards="group", overlong_buffer=2, max_tokens=4)
    assert advantages(batch, "writer") == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)], rel=1e-3)


def test_only_calls_that_a_reward_reaches_train() -> None:
    turns = call("writer", [3], prompt=[1]), call("writer", [5, 6], prompt=[1, 3, 4])
    praised = trajectory("r1", *turns, reward_on(turns[1], 1.0))
    batch = batch_of(praised, single("r2", 0.0, [9]))
    assert [(v.advantage, v.reason) for v in batch.outcomes] == [
        (None, DropReason.NO_REWARD),
        (0.5, None),
        (-0.5, None),
    ]
    row = batch.rows["writer"][0]
    assert (list(row.loss_mask), row.weight) == ([0, 0, 0, 1, 1], 1 / 4)


# --- outcomes of calls --------------------------------------------------------------------------------------


def test_what_does_not_train_says_why() -> None:
    unknown = chat(attributes={semconv.ROLE: "writer"})
    made = [
        single("r1", 1.0),
        single("r2", 0.0),
        trajectory("r3", call("writer"), reward_on(None, 1.0), failed=True),
        single("r4", None),
        trajectory("r5", call("judge"), reward_on(None, 1.0)),
        trajectory("r6", unknown, reward_on(None, 1.0)),
        single("s1", 3.0, group_id="h"),
        single("s2", 3.0, group_id="h"),
        single("t1", 3.0, group_id="alone"),
    ]
    batch = batch_of(*made, scale_rewards="group")
    outcomes = {outcome.call.rollout_id: outcome for outcome in batch.outcomes}
    assert {rollout_id: outcome.reason for rollout_id, outcome in outcomes.items()} == {
        "r1": None,
        "r2": None,
        "r3": DropReason.FAILED_ROLLOUT,
        "r4": DropReason.NO_REWARD,
        "r5": DropReason.ROLE_NOT_TRAINED,
        "r6": DropReason.NO_IDS,
        "s1": DropReason.ZERO_ADVANTAGE,
        "s2": DropReason.ZERO_ADVANTAGE,
        "t1": DropReason.ZERO_ADVANTAGE,
    }
    assert batch.dropped() == {
        "failed_rollout": 1,
        "no_reward": 1,
        "role_not_trained": 1,
        "no_ids": 1,
        "zero_advantage": 3,
    }
    # Neither the failed one nor the one without a reward is in the baseline of its group.
    assert [outcomes[name].advantage for name in ("r1", "r2")] == pytest.approx([0.7070, -0.7070], abs=1e-4)
    # Five rollouts have a credit, and each of the two that train has two tokens.
    assert [row.weight for row in batch.rows["writer"]] == [1 / 10, 1 / 10]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_whether_rewards_differ_does_not_depend_on_their_scale(scale: float, scale_rewards: str) -> None:
    equal = [single(f"e{i}", scale * value, group_id="equal") for i, value in enumerate((0.1 + 0.2, 0.3, 0.3))]
    close = [single(f"c{i}", scale * value, group_id="close") for i, value in enumerate((1e6, 1e6 + 1))]
    batch = batch_of(*equal, *close, scale_rewards=scale_rewards)
    assert batch.zero_variance_groups == ["equal"]
    assert reasons(batch) == [DropReason.ZERO_ADVANTAGE] * 3 + [None] * 2


def test_equal_rewards_whose_mean_is_rounded_train_nothing() -> None:
    batch = batch_of(*(single(f"r{i}", 0.1) for i in range(3)), scale_rewards="group")
    assert reasons(batch) == [DropReason.ZERO_ADVANTAGE] * 3
    assert batch.rows == {}


CALLS = st.tuples(st.sampled_from(["writer", "fixer", "judge"]), st.booleans(), st.sampled_from([None, 0.0, 1.0]))
ROLLOUTS = st.lists(
    st.tuples(st.lists(CALLS, max_size=4), st.sampled_from([None, 0.0, 0.5, 1.0]), st.booleans()), max_size=6
)


def random_trajectory(index: int, calls: list[tuple[str, bool, float | None]], value: float | None, failed: bool):
    spans: list[Span] = []
    for place, (role, has_ids, own) in enumerate(calls):
        made = call(role, [10 + place], prompt=[1, place % 2]) if has_ids else chat(attributes={semconv.ROLE: role})
        spans += [made] if own is None else [made, reward_on(made, own)]
    rewards = [] if value is None else [reward_on(None, value)]
    return trajectory(f"r{index}", *spans, *rewards, group_id=f"g{index % 2}", failed=failed)


@given(ROLLOUTS, st.sampled_from(["group", "batch", "none"]), st.sampled_from([0.0, 0.85, 1.0]))
def test_there_is_one_outcome_for_every_call_and_what_trains_is_in_a_row(rollouts, scale, gamma: float) -> None:
    made = [random_trajectory(index, *rollout) for index, rollout in enumerate(rollouts)]
    batch = batch_of(*made, scale_rewards=scale, gamma=gamma)
    calls = sorted(call.span_id for trajectory in made for call in trajectory.calls)
    assert sorted(outcome.call.span_id for outcome in batch.outcomes) == calls
    assert all((outcome.reason is None) == (outcome.advantage is not None) for outcome in batch.outcomes)
    assert sum(batch.dropped().values()) + sum(outcome.reason is None for outcome in batch.outcomes) == len(calls)
    # Every call here samples one token.
    trained = sorted(outcome.advantage for outcome in batch.outcomes if outcome.advantage is not None)
    in_rows = sorted(value for rows in batch.rows.values() for row in rows for value in row.advantages if value)
    assert in_rows == trained
    assert all(math.isfinite(value) for value in trained)
    assert "judge" not in batch.rows


def test_minibatches_deal_out_the_groups_and_each_weighs_its_own_rollouts() -> None:
    made = [single(f"{group}{i}", float(i), group_id=group) for group in "abc" for i in range(4)]
    whole, dealt = batch_of(*made), batch_of(*made, minibatches=2)
    first, second = dealt.minibatches(["writer"]).values()
    assert [len(first), len(second)] == [8, 4]
    assert sorted(row.advantages for row in first + second) == sorted(row.advantages for row in whole.rows["writer"])
    assert [{row.weight for row in rows} for rows in (first, second)] == [{1 / (2 * 8)}, {1 / (2 * 4)}]
    assert [len(rows) for rows in batch_of(*made, minibatches=8).minibatches(["writer"]).values()] == [4, 4, 4]


def aged(rollout_id: str, value: float, version: int, **attributes: Any) -> Trajectory:
    made = call("writer", [3, 4], **({semconv.POLICY_VERSION: f"writer@{version}"} | attributes))
    return trajectory(rollout_id, made, reward_on(None, value))


def test_what_an_old_policy_sampled_is_dropped() -> None:
    made = [aged(f"r{version}", float(version), version) for version in (1, 2, 3)]
    batch = grpo_batch(made, {"writer": RoleState(version=3)}, batch_options(scale_rewards="none", max_staleness=1))
    assert [outcome.reason for outcome in batch.outcomes] == [DropReason.STALE, DropReason.ZERO_ADVANTAGE, None]
    batch = grpo_batch(made, {"writer": RoleState(version=3)}, batch_options(scale_rewards="none", max_staleness=2))
    assert [outcome.reason for outcome in batch.outcomes] == [None, DropReason.ZERO_ADVANTAGE, None]


def test_an_answer_that_was_cut_may_be_left_out_of_the_loss_but_not_of_the_baseline() -> None:
    cut = aged("r1", 1.0, 3, **{semconv.GEN_AI_RESPONSE_FINISH_REASONS: ["length"]})
    batch = batch_of(cut, aged("r2", 0.0, 3), mask_truncated_completions=True)
    assert [(outcome.advantage, outcome.reason) for outcome in batch.outcomes] == [
        (None, DropReason.TRUNCATED),
        (-0.5, None),
    ]
    assert batch_of(cut, aged("r2", 0.0, 3)).dropped() == {}


def test_a_frozen_role_and_a_replaced_group_say_so() -> None:
    made = [single("r1", 1.0), single("r2", 0.0), single("s1", 1.0, group_id="h")]
    frozen = grpo_batch(made, {"writer": RoleState(trains=False)}, BatchOptions())
    assert frozen.dropped() == {"role_frozen": 3} and not frozen.rows
    states = {"writer": RoleState()}
    assert grpo_batch(made, states, BatchOptions()).zero_variance_groups == ["h"]
    replaced = grpo_batch(made, states, BatchOptions(), replaced_groups=frozenset(["h"]))
    assert replaced.dropped() == {"replaced_group": 1}
    assert [row.weight for row in replaced.rows["writer"]] == [1 / 4] * 2


def test_with_a_term_beside_the_advantage_everything_trains() -> None:
    made = [single("r1", 1.0), single("r2", 1.0)]
    batch = batch_of(*made, beta=0.1)
    assert advantages(batch, "writer") == [0.0, 0.0]
    assert len(batch.rows["writer"]) == 2


def test_a_step_that_was_not_taken_trained_no_call() -> None:
    made = [single(f"{group}{i}", float(i), group_id=group) for group in "ab" for i in range(2)]
    batch = batch_of(*made, minibatches=2)
    batch.skip(["writer"], 1)
    assert reasons(batch) == [None, None, DropReason.SKIPPED_STEP, DropReason.SKIPPED_STEP]
    assert advantages(batch, "writer") == [-0.5, 0.5, None, None]


def test_rows_take_the_temperature_that_their_logprobs_are_of() -> None:
    cold, warm = (sampled_with(f"r{t}", t, {semconv.GEN_AI_REQUEST_TEMPERATURE: t}) for t in (0.5, 2.0))
    rows = batch_of(cold, warm).rows["writer"]
    assert [row.temperatures for row in rows] == [[1.0, 1.0, 0.5, 0.5], [1.0, 1.0, 2.0, 2.0]]
    assert not any(map(math.isnan, rows[0].logprobs[2:]))
    kept = batch_of(cold, warm, rejection=Rejection(0.0)).rows["writer"]
    assert [row.temperatures for row in kept] == [None, None]


def versioned(index: int, version: int, attributes: dict[str, Any]) -> Trajectory:
    span = gateway_call([1, 2], [3, 4], role="writer", version=f"writer@{version}", attributes=attributes)
    return trajectory(f"r{index}", span, reward_on(None, float(index**2)))


def test_raw_logprobs_of_a_tempered_call_are_computed_by_the_current_version_only() -> None:
    """Before the temperature they are those of another distribution; a call of an older version cannot train."""
    hot = {semconv.GEN_AI_REQUEST_TEMPERATURE: 0.7}
    made = [versioned(0, 4, hot), versioned(1, 3, hot), versioned(2, 3, {})]
    states = {"writer": RoleState(version=4)}
    options = BatchOptions(logprobs_mode="raw_logprobs")
    batch = grpo_batch(made, states, options)
    assert reasons(batch) == [None, DropReason.RAW_LOGPROBS, None]
    current, whole = batch.rows["writer"]
    assert all(map(math.isnan, current.logprobs[2:])) and not any(map(math.isnan, whole.logprobs[2:]))
    assert reasons(grpo_batch(made, states, BatchOptions())) == [None, None, None]
    stored = grpo_batch(made, states, replace(options, from_store=True))
    assert reasons(stored) == [DropReason.RAW_LOGPROBS, DropReason.RAW_LOGPROBS, None]


def test_declared_limits_are_those_of_each_call_and_of_the_version_that_keeps_the_tokens() -> None:
    top_p = {semconv.GATEWAY_SAMPLING: '{"top_p":0.9}'}
    other = {semconv.GATEWAY_SAMPLING: '{"top_p":0.8}'}
    made = [versioned(0, 4, top_p), versioned(1, 3, top_p), versioned(2, 4, other), versioned(3, 4, {})]
    batch = grpo_batch(made, {"writer": RoleState(version=4)}, BatchOptions(sampling={"top_p": 0.9}))
    assert reasons(batch) == [None, DropReason.STALE, DropReason.CONSTRAINED, DropReason.CONSTRAINED]
    assert [row.truncation for row in batch.rows["writer"]] == [Truncation(top_p=0.9)]
    undeclared = grpo_batch(made, {"writer": RoleState(version=4)}, BatchOptions())
    assert reasons(undeclared) == [DropReason.CONSTRAINED] * 3 + [None]


def sampled_with(rollout_id: str, value: float, attributes: dict[str, Any]) -> Trajectory:
    return trajectory(rollout_id, call("writer", [3, 4], **attributes), reward_on(None, value))


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({semconv.GEN_AI_REQUEST_TEMPERATURE: 0.0}, DropReason.GREEDY),
        ({semconv.GATEWAY_CONSTRAINTS: ["response_format"]}, DropReason.CONSTRAINED),
    ],
)
def test_a_policy_gradient_leaves_out_what_another_distribution_sampled(
    attributes: dict[str, Any], reason: DropReason
) -> None:
    """It still counts for the baseline: what it earned says how good the policy is."""
    made = [sampled_with("r1", 1.0, attributes), sampled_with("r2", 0.0, {})]
    batch = batch_of(*made)
    assert [(outcome.advantage, outcome.reason) for outcome in batch.outcomes] == [(None, reason), (-0.5, None)]
    assert len(batch.rows["writer"]) == 1
    assert batch_of(*[sampled_with(f"r{i}", float(i), attributes) for i in range(2)]).zero_variance_groups == ["g"]
    kept = [outcome for outcome in batch_of(*made, rejection=Rejection()).outcomes if outcome.reason is None]
    assert [outcome.call.rollout_id for outcome in kept] == ["r1"]


@pytest.mark.parametrize("normalization", ["bnpo", "dr_grpo", "luspo"])
def test_the_step_may_be_normalised_as_trl_does(normalization: str) -> None:
    made = [single("r1", 1.0, [3] * 4), single("r2", 0.0, [3] * 2), single("r3", 0.5, [3] * 6)]
    rows = batch_of(*made, normalization=normalization, max_tokens=10).rows["writer"]
    # The third does not train, and yet it counts.
    assert [row.weight for row in rows] == [{"bnpo": 1 / 12, "dr_grpo": 1 / 30, "luspo": 1 / 3}[normalization]] * 2
