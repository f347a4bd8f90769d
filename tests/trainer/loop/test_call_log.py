"""Every call has one outcome: steps, metrics and `agl inspect` add up to the calls, for any rollouts."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agl import semconv
from agl.cli.inspection import Inspection
from agl.span import Span, now_ns
from agl.store import open_store
from agl.trajectory import DropReason, Trajectory, build_trajectory, trained_span
from agl_trainer.algo.batch import CallOutcome, GrpoBatch
from agl_trainer.algo.batch_builder import grpo_batch
from agl_trainer.algo.options import BatchOptions, RoleState
from agl_trainer.loop.call_log import (
    CallLog,
    call_metrics,
    rollouts_without_reward,
    warn_of_missing_rewards,
    warn_of_shared_seeds,
    warn_of_unused_weights,
)
from tests.core.span_maker import chat, reward, span
from tests.trainer.rollout_maker import batch_options, call, reward_on, trajectory

ROLES = ("writer", "fixer", "frozen", "unknown")
KINDS = ("plain", "no ids", "cut", "old", "failed", "empty", "foreign")
CALLS = st.tuples(
    st.sampled_from(ROLES), st.sampled_from(KINDS), st.sampled_from([None, 0.5]), st.sampled_from([1, 2]), st.booleans()
)
ROLLOUTS = st.lists(
    st.tuples(st.lists(CALLS, max_size=5), st.sampled_from([None, 0.0, 1.0]), st.booleans()), max_size=6
)
OPTIONS = st.fixed_dictionaries(
    {
        "advantage": st.sampled_from(["grpo", "rloo", "reinforce++", "max@k", "ema"]),
        "minibatches": st.sampled_from([1, 2]),
        "max_staleness": st.sampled_from([None, 1]),
        "mask_truncated_completions": st.booleans(),
        "beta": st.sampled_from([0.0, 0.1]),
        "normalization": st.sampled_from([None, "dapo"]),
    }
)


def made_call(role: str, kind: str, attempt: int, place: int, prompt: Sequence[int]) -> Span:
    own: dict[str, Any] = {semconv.ATTEMPT_ID: f"r-a{attempt}"}
    if kind == "no ids":
        return chat(attributes=own | {semconv.ROLE: role})
    if kind == "cut":
        own[semconv.GEN_AI_RESPONSE_FINISH_REASONS] = ["length"]
    own[semconv.POLICY_VERSION] = f"{role}@{1 if kind == 'old' else 5}"
    response = [] if kind == "empty" else [90 + place] if kind == "foreign" else [10 + place]
    made = call(role, response, prompt=prompt, **own)
    if kind == "failed":
        made = span(made.name, dict(made.attributes), status="error", message="503")
    return made


def spans_of(calls: list[tuple[str, str, float | None, int, bool]], value: float | None, failed: bool) -> list[Span]:
    """Calls of two attempts; `goes_on`: the call continues the previous one, if possible in the same row."""
    spans, context = [], [1, 2]
    for place, (role, kind, own, attempt, goes_on) in enumerate(calls):
        made = made_call(role, kind, attempt, place, context if goes_on else [1, 2, 30 + place])
        context = [*context, 10 + place, 7] if goes_on else context
        spans += [made] if own is None else [made, reward_on(made, own)]
    return spans if value is None else [*spans, reward(value, {semconv.ATTEMPT_ID: "r-a2"})]


@settings(max_examples=150)
@given(ROLLOUTS, OPTIONS, st.sampled_from([None, 4]), st.booleans(), st.booleans())
def test_outcomes_metrics_and_inspection_add_up_to_the_calls(
    rollouts: Any, options: dict[str, Any], longest: int | None, is_skipped: bool, is_replaced: bool
) -> None:
    spans_by_rollout, made = [], []
    for index, (calls, value, failed) in enumerate(rollouts):
        spans = spans_of(calls, value, failed)
        made.append(trajectory(f"r{index}", *spans, group_id=f"g{index % 2}", failed=failed))
        spans_by_rollout.append(spans)
    limits: dict[str, Any] = {"vocabulary_size": 90, "max_row_tokens": longest}
    roles = {role: RoleState(version=5, **limits) for role in ("writer", "fixer")}
    roles["frozen"] = RoleState(trains=False, **limits)
    replaced = frozenset(["g0"] if is_replaced else [])
    batch = grpo_batch(made, roles, batch_options(**options), replaced_groups=replaced)
    if is_skipped:
        batch.skip(["writer"], 0)
    calls = [call for one in made for call in one.calls]
    assert sorted(outcome.call.span_id for outcome in batch.outcomes) == sorted(call.span_id for call in calls)
    check_weights(batch)

    metrics = call_metrics(batch.outcomes)
    assert metrics["calls"] == len(calls) == sum(metrics.values()) - metrics["calls"]
    ends: Counter[str] = Counter()
    for spans, one in zip(spans_by_rollout, made, strict=True):
        outcomes = [outcome for outcome in batch.outcomes if outcome.call.rollout_id == one.rollout_id]
        trained = [
            trained_span(outcome.call, 7, outcome.advantage, outcome.reason, weight=outcome.weight)
            for outcome in outcomes
        ]
        if spans:
            ends += Inspection([*spans, *trained]).outcomes
    named = {name.removeprefix("calls/").removeprefix("dropped/"): count for name, count in metrics.items()}
    assert dict(ends) == {name: count for name, count in named.items() if name != "calls" and count}


def check_weights(batch: GrpoBatch) -> None:
    """Trained calls have an advantage and a weight, dropped calls neither; rows have no unknown token."""
    trained = [outcome for outcome in batch.outcomes if outcome.reason is None]
    for outcome in batch.outcomes:
        assert (outcome.reason is None) == (outcome.advantage is not None) == (outcome.weight is not None)
    weights = {row.weight for rows in batch.rows.values() for row in rows}
    if not any(outcome.reason is DropReason.SKIPPED_STEP for outcome in batch.outcomes):
        assert {outcome.weight for outcome in trained} == weights
    assert all(max(row.token_ids) < 90 for rows in batch.rows.values() for row in rows)


def test_a_row_is_cut_where_it_gets_too_long() -> None:
    """The first turn still trains; nothing is computed for the one that ends beyond the limit."""
    turns = call("writer", [3], prompt=[1]), call("writer", [5, 6], prompt=[1, 3, 4])
    made = [
        trajectory("r1", *turns, reward_on(None, 1.0)),
        trajectory("r2", call("writer", [9], prompt=[1]), reward_on(None, 0.0)),
    ]
    batch = grpo_batch(made, {"writer": RoleState(max_row_tokens=4)}, batch_options(scale_rewards="none"))
    assert [(outcome.reason, outcome.advantage) for outcome in batch.outcomes] == [
        (None, 0.5),
        (DropReason.TOO_LONG, None),
        (None, -0.5),
    ]
    row = batch.rows["writer"][0]
    assert (list(row.token_ids), list(row.loss_mask), list(row.logprobs)) == ([1, 3], [0, 1], [0.0, -0.5])


def test_a_row_of_another_models_tokens_says_so() -> None:
    made = [trajectory(f"r{i}", call("writer", [3, 400 * i]), reward_on(None, float(i))) for i in range(2)]
    batch = grpo_batch(made, {"writer": RoleState(vocabulary_size=400)}, batch_options(scale_rewards="none"))
    assert [outcome.reason for outcome in batch.outcomes] == [None, DropReason.UNKNOWN_TOKENS]


def test_a_call_that_arrives_after_its_rollout_was_counted_is_counted_once_in_the_next_step(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'agl.db'}")
    call_log = CallLog(store, "shop")
    early, late = (call("writer", **{semconv.ROLLOUT_ID: "hung"}) for _ in range(2))
    store.append_spans([early])
    assert call_log.late_calls() == []
    outcomes = [CallOutcome(made, None, DropReason.FAILED_ROLLOUT) for made in build_trajectory([early]).calls]
    call_log.record(3, outcomes, unfinished=["hung", "silent"])
    store.append_spans([late])
    found = call_log.late_calls()
    assert [(outcome.call.span_id, outcome.reason) for outcome in found] == [(late.span_id, DropReason.LATE)]
    call_log.record(4, found)
    assert call_log.late_calls() == []
    ends = Inspection(store.query_spans("hung")).outcomes
    store.close()
    assert ends == {"failed_rollout": 1, "late": 1}


def test_a_reward_that_arrives_after_its_step_is_late(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'agl.db'}")
    named = {semconv.ROLLOUT_ID: "slow"}
    asked = call("writer", **named)
    store.append_spans([asked, reward(1.0, named | {semconv.ROLE: "fixer"})])
    call_log = CallLog(store, "shop")
    made = build_trajectory(store.query_spans("slow"))
    call_log.record(1, [CallOutcome(made.calls[0], None, DropReason.NO_REWARD)])
    call_log.warn_of_late_rewards()
    assert caplog.text == ""
    store.append_spans([replace(reward(0.5, named), start_ns=now_ns())])
    call_log.warn_of_late_rewards()
    assert "the rewards of 1 rollouts (slow) arrived late, after the step had counted them" in caplog.text


def test_rollouts_that_no_reward_reaches_are_named(caplog: pytest.LogCaptureFixture) -> None:
    turns = call("writer", [3], prompt=[1]), call("writer", [5, 6], prompt=[1, 3, 4])
    made = [
        trajectory("with", call("writer"), reward_on(None, 1.0)),
        trajectory("partly", *turns, reward_on(turns[1], 1.0)),
        trajectory("without", call("writer"), call("fixer")),
    ]
    batch = grpo_batch(made, {"writer": RoleState(), "fixer": RoleState()}, BatchOptions())
    with caplog.at_level(logging.WARNING):
        warn_of_missing_rewards(rollouts_without_reward(batch.outcomes), "their groups")
    assert "no reward reaches 1 rollouts (without): they are left out of their groups" in caplog.text
    caplog.clear()
    others = [outcome for outcome in batch.outcomes if outcome.call.rollout_id != "without"]
    warn_of_missing_rewards(rollouts_without_reward(others), "their groups")
    assert caplog.text == ""


def test_a_role_whose_weights_name_no_dimension_of_its_rewards_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    parts = {"agl.reward.goal": 1.0, "agl.reward.style": 0.0}
    made = [trajectory("r1", call("writer"), call("fixer"), reward(0.5, parts))]
    weights = {"writer": {"goal": 1.0, "brevity": 1.0}, "fixer": {"gaol": 1.0, "brevity": 1.0}, "judge": {}}
    warn_of_unused_weights(made, weights)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message == (
        "role fixer has weights for brevity, gaol (agent_roles.<role>.rewards, or rewards), but the rewards that reach "
        "it in this step have the dimensions goal, style; a dimension without a weight counts 0"
    )
    caplog.clear()
    warn_of_unused_weights([trajectory("r1", call("writer"), reward_on(None, 1.0))], {"writer": {"goal": 1.0}})
    assert "have no dimensions" in caplog.text
    warn_of_unused_weights([trajectory("r1", call("writer"))], {"writer": {"goal": 1.0}})
    assert len(caplog.records) == 1


def test_a_seed_of_the_agent_that_makes_a_group_alike_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    def made(rollout_id: str, response: list[int], seed: int, group_id: str = "g") -> Trajectory:
        own: dict[str, Any] = {semconv.GEN_AI_REQUEST_SEED: seed}
        return trajectory(rollout_id, call("writer", response, **own), group_id=group_id)

    alike = [made("r0", [3], 7), made("r1", [3], 7), made("r2", [4], 7)]
    apart = [made("s0", [3], 1, "h"), made("s1", [3], 2, "h"), made("s2", [4], 2, "h")]
    repeated = [made("t0", [3], 5, "i"), made("t0~1", [3], 5, "i")]
    warn_of_shared_seeds([*apart, *repeated])
    assert not caplog.records
    warn_of_shared_seeds([*alike, *apart])
    assert "in 1 of 2 groups, rollouts got equal answers because the request sets a seed (7)" in caplog.text
