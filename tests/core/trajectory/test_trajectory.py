"""Rows and drops of a rollout."""

import math
import random
import struct
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agl import semconv
from agl.errors import TrajectoryError
from agl.span import Span
from agl.tokens.drift import Difference, Drift, Drifted
from agl.trajectory import DropReason, Row, Trajectory, build_trajectory, collect_trained, trained_span
from tests.core.span_maker import OTHER_TRACE, TRACE, chat, gateway_call, reward, span, tokens


def rows_of(*spans: Span) -> list[Row]:
    trajectory = build_trajectory(spans)
    assert not trajectory.drops
    return trajectory.rows


def drifts(row: Row) -> list[Drift | None]:
    return [turn.drift for turn in row.turns]


def sole_drop(*spans: Span) -> tuple[DropReason, str]:
    trajectory = build_trajectory(spans)
    (drop,) = trajectory.drops
    assert len(trajectory.calls) == 1 + sum(len(row.turns) for row in trajectory.rows)
    return drop.reason, drop.detail


# --- Rows ----------------------------------------------------------------------------------------------------------


def test_turns_that_continue_token_by_token_are_one_row() -> None:
    first, second = gateway_call([1, 2], [3, 4]), gateway_call([1, 2, 3, 4, 5], [6])
    (row,) = rows_of(first, second)
    assert row.token_ids == [1, 2, 3, 4, 5, 6]
    assert row.loss_mask == [0, 0, 1, 1, 0, 1]
    assert row.logprobs == [0.0, 0.0, -0.5, -0.5, 0.0, -0.5]
    assert row.call_ids == [first.span_id, second.span_id]
    assert [(turn.start, turn.end) for turn in row.turns] == [(2, 4), (5, 6)]
    assert drifts(row) == [None, Drift.CLEAN]
    assert (row.role, row.version, row.rollout_id) == ("writer", "writer@3", "r-1")


def test_interleaved_sub_agents_merge_each_into_its_own_row() -> None:
    """A comparison with the previous call only would split them."""
    spans = [
        gateway_call([1], [2]),
        gateway_call([8], [9]),
        gateway_call([1, 2, 3], [4]),
        gateway_call([8, 9, 7], [6]),
    ]
    left, right = rows_of(*spans)
    assert (left.token_ids, right.token_ids) == ([1, 2, 3, 4], [8, 9, 7, 6])


def test_the_longest_row_that_fits_is_continued() -> None:
    short, long = gateway_call([1], [2]), gateway_call([1, 2, 3, 4], [5], version="writer@4")
    shorter, longer = rows_of(short, long, gateway_call([1, 2, 3, 4, 5, 6], [7], version="writer@4"))
    assert (len(shorter.turns), longer.token_ids) == (1, [1, 2, 3, 4, 5, 6, 7])


def test_several_responses_to_one_prompt_are_separate_rows() -> None:
    """Keeping only the last call of a prompt would lose all but one sample of best-of-n."""
    rows = rows_of(gateway_call([1], [2]), gateway_call([1], [3]), gateway_call([1], [2]))
    assert [row.token_ids for row in rows] == [[1, 2], [1, 3], [1, 2]]
    assert [drifts(row) for row in rows] == [[None], [Drift.FORK], [Drift.FORK]]


def test_a_second_continuation_of_the_same_history_is_a_fork_that_trains_only_its_own_answer() -> None:
    main, fork = rows_of(gateway_call([1], [2]), gateway_call([1, 2, 3], [4]), gateway_call([1, 2, 5, 5], [6]))
    assert main.loss_mask == [0, 1, 0, 1]
    assert (fork.token_ids, fork.loss_mask, drifts(fork)) == ([1, 2, 5, 5, 6], [0, 0, 0, 0, 1], [Drift.FORK])


def test_the_drift_that_the_gateway_recorded_takes_precedence() -> None:
    """By token ids alone, a history that differs before the latest response is a new conversation."""
    first = gateway_call([1, 2], [3, 4])
    drifted = Drifted(Drift.REASONING, Difference(1, 2, 9, "<think>", "so"), first.span_id)
    second = gateway_call([1, 9, 5], [6], attributes={semconv.GATEWAY_DRIFT: drifted.to_json()})
    forked = gateway_call([1, 2], [8], attributes={semconv.GATEWAY_DRIFT: drifted.to_json()})
    rows = rows_of(first, second, forked)
    assert [drifts(row) for row in rows] == [[None], [Drift.REASONING], [Drift.FORK]]
    assert [turn.difference for row in rows for turn in row.turns] == [None, drifted.difference, None]
    assert str(drifted.difference) == "token 1: 2 '<think>' was sampled, the prompt has 9 'so'"


def test_a_history_with_other_tokens_for_the_answer_is_retokenized() -> None:
    first, second = rows_of(gateway_call([1], [2, 3]), gateway_call([1, 9, 4], [5]))
    assert (drifts(first), drifts(second)) == ([None], [Drift.RETOKENIZED])
    assert (second.token_ids, second.loss_mask) == ([1, 9, 4, 5], [0, 0, 0, 1])


def test_the_drift_is_named_against_the_call_that_shares_most() -> None:
    """The third call continues the first exactly, but its prompt has the second call's response changed."""
    *_, last = rows_of(gateway_call([1], [2]), gateway_call([1, 2, 3], [4, 5]), gateway_call([1, 2, 3, 9, 6], [7]))
    assert drifts(last) == [Drift.RETOKENIZED]


def test_the_difference_is_taken_from_the_answer_that_was_sent_back() -> None:
    spans = [gateway_call([1, 2], [10, 11, 12]), gateway_call([1, 2], [20, 21, 22])]
    *_, last = rows_of(*spans, gateway_call([1, 2, 20, 99, 22, 5], [6]))
    assert last.turns[0].difference == Difference(3, 21, 99)
    *_, unknown = rows_of(*spans, gateway_call([1, 2, 30, 99], [6]))
    assert (drifts(unknown), unknown.turns[0].difference) == ([Drift.RETOKENIZED], None)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_later_of_two_continuations_is_the_fork_whichever_is_longer(length: int) -> None:
    first, second = gateway_call([1, 2], [3]), gateway_call([1, 2, 3, 4, 5], [6])
    later = gateway_call([1, 2, 3, *[9] * length], [7])
    onward = gateway_call([1, 2, 3, *[9] * length, 7, 8], [4])
    main, fork = rows_of(first, second, later, onward)
    assert main.call_ids == [first.span_id, second.span_id]
    assert (fork.call_ids, drifts(fork)) == ([later.span_id, onward.span_id], [Drift.FORK, Drift.CLEAN])
    assert fork.loss_mask == [0, 0, 0, *[0] * length, 1, 0, 1]


def test_a_prompt_that_ends_inside_an_earlier_answer_is_a_fork() -> None:
    _, regenerated = rows_of(gateway_call([1], [2, 3, 4]), gateway_call([1, 2], [5]))
    assert drifts(regenerated) == [Drift.FORK]


def test_unrelated_prompts_start_conversations_of_their_own() -> None:
    assert [drifts(row) for row in rows_of(gateway_call([1, 2], [3]), gateway_call([1, 5], [6]))] == [[None], [None]]


@pytest.mark.parametrize(("role", "version"), [("fixer", "writer@3"), ("writer", "writer@4")])
def test_roles_and_policy_versions_never_share_a_row(role: str, version: str) -> None:
    rows = rows_of(
        gateway_call([1], [2], role="writer"),
        gateway_call([1, 2, 3], [4], role=role, version=version),
    )
    assert [row.loss_mask for row in rows] == [[0, 1], [0, 0, 0, 1]]


def test_merging_does_not_depend_on_clocks() -> None:
    later, earlier = gateway_call([1, 2, 3], [4], start=1), gateway_call([1], [2], start=2)
    (row,) = rows_of(later, earlier)
    assert row.call_ids == [earlier.span_id, later.span_id]


# --- Drops ---------------------------------------------------------------------------------------------------------


def without(name: str, spans: Span) -> Span:
    return replace(spans, attributes={key: value for key, value in spans.attributes.items() if key != name})


def test_the_drop_of_a_framework_call_without_ids_says_how_to_get_ids() -> None:
    reason, detail = sole_drop(chat())
    assert reason is DropReason.NO_IDS
    assert "set return_token_ids: point the model's base URL at the gateway" in detail
    assert (
        "if it is the gateway's already, its span of this call is in another trace: switch on the instrumentor"
        in detail
    )


def test_the_drop_of_a_gateway_call_without_ids_names_the_engine() -> None:
    bare = without(semconv.PROMPT_TOKEN_IDS, without(semconv.RESPONSE_TOKEN_IDS, gateway_call()))
    reason, detail = sole_drop(bare)
    assert (reason, "engine" in detail) == (DropReason.NO_IDS, True)


def test_the_drop_of_a_call_that_may_be_unjoined_names_traceparent() -> None:
    reason, detail = sole_drop(chat(), gateway_call(trace_id=OTHER_TRACE))
    assert (reason, "traceparent" in detail) == (DropReason.NO_IDS, True)


def test_a_failed_call_is_dropped_with_its_error_and_its_retry_trains() -> None:
    asked = chat()
    failed = gateway_call(parent=asked, status="error", message="engine gone")
    trajectory = build_trajectory([asked, failed, gateway_call([1], [2], parent=asked)])
    assert [(drop.reason, "engine gone" in drop.detail) for drop in trajectory.drops] == [
        (DropReason.FAILED_CALL, True)
    ]
    assert [row.token_ids for row in trajectory.rows] == [[1, 2]]


@pytest.mark.parametrize("response", [b"", None])
def test_a_response_without_tokens_is_a_drop(response: bytes | None) -> None:
    call = without(semconv.RESPONSE_TOKEN_IDS, gateway_call([1], [2]))
    if response is not None:
        call = replace(call, attributes={**call.attributes, semconv.RESPONSE_TOKEN_IDS: response})
    assert sole_drop(call)[0] is DropReason.EMPTY_RESPONSE


def test_missing_logprobs_are_a_drop() -> None:
    reason, detail = sole_drop(without(semconv.RESPONSE_LOGPROBS, gateway_call()))
    assert (reason, "logprobs: true" in detail) == (DropReason.NO_LOGPROBS, True)


def test_a_length_mismatch_is_a_drop_and_never_truncated() -> None:
    reason, detail = sole_drop(gateway_call([1], [2, 3], attributes={semconv.RESPONSE_LOGPROBS: [-0.5]}))
    assert reason is DropReason.LENGTH_MISMATCH
    assert "2 response tokens but 1 logprobs" in detail


def test_unreadable_ids_are_a_drop() -> None:
    reason, detail = sole_drop(gateway_call(attributes={semconv.RESPONSE_TOKEN_IDS: b"123"}))
    assert (reason, "3 bytes" in detail) == (DropReason.MALFORMED, True)


def test_a_response_from_a_cache_trains_once() -> None:
    """A caching client returns the same response, with its id, again; it was sampled once."""
    attributes = {semconv.GEN_AI_RESPONSE_ID: "chatcmpl-7"}
    asked, again = chat(attributes=attributes), chat(attributes=attributes | tokens([1], [2]))
    answered = gateway_call([1], [2], parent=asked, attributes=attributes)
    assert sole_drop(asked, again, answered)[0] is DropReason.REPEATED_ANSWER
    own_ids = [chat(attributes=attributes | tokens([1], [2])) for _ in range(2)]
    assert sole_drop(*own_ids)[0] is DropReason.REPEATED_ANSWER
    other_answers = [chat(attributes=attributes | tokens([1], [number])) for number in range(2)]
    assert not build_trajectory(other_answers).drops


def attempt(number: int, *, start: int, value: float) -> list[Span]:
    named = {semconv.ATTEMPT_ID: f"r-1-a{number}"}
    root = span(
        semconv.SPAN_ROLLOUT, named, start=start, trace_id=f"{number:032x}", status="error", message=f"e{number}"
    )
    return [
        root,
        gateway_call([1], [number], parent=root, attributes=named, start=start + 1),
        reward(value, named, parent=root, start=start + 2),
    ]


@pytest.mark.parametrize("starts", [(10, 20), (20, 10)], ids=["in order", "clock skew"])
def test_only_the_last_attempt_counts(starts: tuple[int, int]) -> None:
    trajectory = build_trajectory(attempt(2, start=starts[0], value=0.2) + attempt(10, start=starts[1], value=1.0))
    assert (trajectory.attempt_id, trajectory.reward, trajectory.error) == ("r-1-a10", 1.0, "e10")
    assert [row.token_ids for row in trajectory.rows] == [[1, 10]]
    (drop,) = trajectory.drops
    assert (drop.reason, drop.call.attempt_id) == (DropReason.SUPERSEDED_ATTEMPT, "r-1-a2")


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ("run-1-on-a100", "run-2-on-a40"),
        ("f47ac10b-58cc-4372-a567-a02450823215", "0e02b2c3-58cc-4372-a567-0e02b2c3d479"),
        ("r-1-a9", "retry-of-r-1"),
        ("r-1-a9", "r-1-a2-again"),
        ("other-a9", "r-1-a2"),
    ],
)
def test_attempts_that_no_store_numbered_are_in_order_of_time(first: str, later: str) -> None:
    spans = [gateway_call(attributes={semconv.ATTEMPT_ID: name}) for name in (first, later)]
    late_span_of_first = reward(1.0, {semconv.ATTEMPT_ID: first})
    assert build_trajectory([*spans, late_span_of_first]).attempt_id == later


# --- Rollout and rewards --------------------------------------------------------------------------------------------


def test_rollout_group_mode_and_error_are_read_from_the_spans() -> None:
    root = span(
        semconv.SPAN_ROLLOUT, {semconv.GROUP_ID: "task-17", semconv.MODE: "eval"}, status="error", message="boom"
    )
    trajectory = build_trajectory([root])
    assert (trajectory.rollout_id, trajectory.group_id, trajectory.mode) == ("r-1", "task-17", "eval")
    assert (trajectory.error, trajectory.reward, trajectory.rows) == ("boom", None, [])


def test_a_trace_that_names_no_rollout_is_an_implicit_rollout() -> None:
    call = without(semconv.ROLLOUT_ID, gateway_call())
    trajectory = build_trajectory([call])
    assert (trajectory.rollout_id, trajectory.rows[0].rollout_id, trajectory.mode) == (TRACE, TRACE, "prod")


def test_spans_of_two_rollouts_are_an_error_that_names_both() -> None:
    with pytest.raises(TrajectoryError, match=r"2 rollouts \(r-1, r-2"):
        build_trajectory([chat(), chat(attributes={semconv.ROLLOUT_ID: "r-2"})])
    with pytest.raises(TrajectoryError, match="no spans"):
        build_trajectory([])


def test_the_last_reward_counts_and_a_roles_own_takes_precedence() -> None:
    spans = [
        gateway_call([1], [2], role="planner"),
        gateway_call([5], [6], role="executor"),
        reward(0.1),
        reward(0.7, {"agl.reward.goal": 1, "agl.reward.syntax": 0.5}),
        reward(0.4, {semconv.ROLE: "planner"}),
        reward(0.9, {semconv.REWARD_TARGET: "elsewhere"}),
    ]
    trajectory = build_trajectory(spans)
    assert trajectory.reward == 0.7
    assert {row.role: row.reward for row in trajectory.rows} == {"planner": 0.4, "executor": 0.7}
    assert trajectory.rewards[1].dimensions == {"goal": 1.0, "syntax": 0.5}
    assert [found.target for found in trajectory.rewards] == [None, None, None, "elsewhere"]
    assert trajectory.rewards_without_call == trajectory.rewards[3:]


def test_agentlightning_rewards_are_read_with_dimensions_and_targets() -> None:
    def annotation(value: float, attributes: dict[str, Any]) -> Span:
        first = {"agentlightning.reward.0.name": "goal", "agentlightning.reward.0.value": value}
        return span("agentlightning.annotation", first | attributes)

    def link(key: str, value: str, number: int = 0) -> dict[str, str]:
        prefix = f"agentlightning.link.{number}"
        return {f"{prefix}.key_match": key, f"{prefix}.value_match": value}

    other = {"agentlightning.reward.1.name": "brevity", "agentlightning.reward.1.value": 1}
    trajectory = build_trajectory(
        [
            annotation(0.5, other),
            annotation(0.1, link("trace_id", TRACE) | link("gen_ai.response.id", "chatcmpl-7", 1)),
            annotation(0.2, link("span_id", "f" * 16)),
            annotation(0.3, link("agentlightning.tag", "draft")),
        ]
    )
    whole, *linked = trajectory.rewards
    assert (trajectory.reward, whole.dimensions) == (0.5, {"goal": 0.5, "brevity": 1.0})
    assert [reward.target for reward in linked] == ["chatcmpl-7", "f" * 16, "agentlightning.tag draft"]


def test_a_reward_belongs_to_the_attempt_of_its_trace_that_only_the_gateway_names() -> None:
    """The URL names the attempt of gateway calls; framework spans and rewards name none."""
    spans: list[Span] = []
    for number, trace in enumerate((TRACE, OTHER_TRACE), start=1):
        answer = {semconv.GEN_AI_RESPONSE_ID: f"chatcmpl-{number}"}
        asked = chat(attributes=answer, trace_id=trace)
        attempt = answer | {semconv.ATTEMPT_ID: f"r-1-a{number}"}
        spans += [asked, reward(number, parent=asked), gateway_call(attributes=attempt, trace_id=f"{number:032x}")]
    first, second = spans[:3], spans[3:]
    assert build_trajectory(first).reward == 1
    trajectory = build_trajectory([*second, *first])
    assert (trajectory.attempt_id, trajectory.reward) == ("r-1-a2", 2)
    assert [found.value for found in trajectory.rewards] == [2]


def test_a_missing_reward_is_none_and_not_zero() -> None:
    trajectory = build_trajectory([gateway_call()])
    assert (trajectory.reward, trajectory.rows[0].reward) == (None, None)


# --- What a step records --------------------------------------------------------------------------------------------


def test_records_of_steps_are_read_back_and_are_not_calls() -> None:
    spans = [gateway_call([1], [2]), gateway_call([5], [6])]
    kept, dropped = build_trajectory(spans).calls
    steps = [
        trained_span(kept, 13, 0.8),
        trained_span(kept, 12, -0.5),
        trained_span(dropped, 12, None, DropReason.ZERO_ADVANTAGE),
    ]
    found = collect_trained([*spans, *steps])
    assert [(one.step, one.advantage, one.reason) for one in found[kept.span_id]] == [(12, -0.5, None), (13, 0.8, None)]
    assert [(one.step, one.advantage, one.reason) for one in found[dropped.span_id]] == [(12, None, "zero_advantage")]
    assert build_trajectory([*spans, *steps]) == build_trajectory(spans)
    assert {one.rollout_id for one in steps} == {"r-1"}


def test_a_repeated_step_has_the_same_span_id() -> None:
    (call,) = build_trajectory([gateway_call()]).calls
    ids = [trained_span(call, step, 0.1).span_id for step in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]
    assert len(ids[2]) == 16


def test_ratios_are_read_back_and_take_a_bounded_number_of_bytes() -> None:
    (call,) = build_trajectory([gateway_call()]).calls
    long, alike = [1.0 + place % 7 / 8 for place in range(20_000)], [1.5] * 20_000
    for recorded, size, ends in ((long, 65_536, (1.0, None)), (alike, 4, (1.5, 1.5)), ([0.75, 1.25], 8, (0.75, None))):
        record = trained_span(call, 1, 0.5, ratios=recorded)
        packed = record.attributes[semconv.TRAINED_RATIOS]
        assert isinstance(packed, bytes) and len(packed) == size
        (word,) = collect_trained([record])[call.span_id]
        assert (word.ratio_of(0), word.ratio_of(19_999)) == ends
        assert [word.ratio_of(place) for place in range(2)] == recorded[:2]
    for broken in (b"123", struct.pack("<f", math.nan), "1.0"):
        damaged = replace(record, attributes={**record.attributes, semconv.TRAINED_RATIOS: broken})
        assert collect_trained([damaged])[call.span_id][0].ratio_of(0) is None


# --- Property -------------------------------------------------------------------------------------------------------

SMALL = st.lists(st.integers(0, 2), min_size=1, max_size=3)


@st.composite
def rollouts(draw: st.DrawFn) -> list[Span]:
    """Calls that continue, fork, retokenize, repeat, fail and lose ids at random, in random order of arrival."""
    contexts: list[list[int]] = [[]]
    spans: list[Span] = []
    for unique in range(draw(st.integers(1, 12))):
        prompt = [*draw(st.sampled_from(contexts)), *draw(SMALL)]
        # A token of its own in every answer, so that a token trained twice is seen to be.
        response = [100 + unique, *draw(SMALL)][: draw(st.integers(0, 3))]
        contexts.append(prompt + response)
        call = gateway_call(
            prompt,
            response,
            role=draw(st.sampled_from(["writer", "fixer"])),
            version=draw(st.sampled_from(["writer@3", "writer@4"])),
            start=draw(st.integers(0, 3)),
            status=draw(st.sampled_from(["unset", "unset", "error"])),
        )
        lost = draw(st.sampled_from(["", "", semconv.RESPONSE_TOKEN_IDS, semconv.RESPONSE_LOGPROBS]))
        spans.append(without(lost, call))
    random.Random(draw(st.integers(0, 9))).shuffle(spans)
    return spans


def trained_positions(trajectory: Trajectory) -> Counter[tuple[str, int]]:
    """How often each sampled token, named by call and position in its response, has mask 1."""
    return Counter(
        (turn.call.span_id, place)
        for row in trajectory.rows
        for turn in row.turns
        for place in range(turn.end - turn.start)
        if row.loss_mask[turn.start + place]
    )


@settings(max_examples=200)
@given(rollouts())
def test_every_sampled_token_trains_exactly_once_and_every_call_is_a_turn_or_a_drop(spans: list[Span]) -> None:
    trajectory = build_trajectory(spans)
    turns = [turn for row in trajectory.rows for turn in row.turns]
    accounted = [turn.call.span_id for turn in turns] + [drop.call.span_id for drop in trajectory.drops]
    assert sorted(accounted) == sorted(span.span_id for span in spans)

    positions = trained_positions(trajectory)
    assert positions == Counter(
        (turn.call.span_id, place) for turn in turns for place in range(len(turn.call.response_ids or ()))
    )
    assert sum(sum(row.loss_mask) for row in trajectory.rows) == positions.total()
    for row in trajectory.rows:
        assert len(row.token_ids) == len(row.loss_mask) == len(row.logprobs)
        for turn in row.turns:
            assert row.token_ids[: turn.start] == turn.call.prompt_ids
            assert row.token_ids[turn.start : turn.end] == turn.call.response_ids
            assert row.logprobs[turn.start : turn.end] == turn.call.logprobs
            assert (row.role, row.version) == (turn.call.role, turn.call.policy_version)
        untrained = [logprob for mask, logprob in zip(row.loss_mask, row.logprobs, strict=True) if not mask]
        assert not any(untrained)


@settings(max_examples=50)
@given(rollouts())
def test_the_order_of_arrival_changes_nothing(spans: list[Span]) -> None:
    assert build_trajectory(spans) == build_trajectory(spans[::-1])
