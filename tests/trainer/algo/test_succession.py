"""Which calls follow which: the order in which concurrent branches happen to run changes no credit."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agl.span import Span
from agl.trajectory import build_trajectory
from agl_trainer.algo.succession import Distance, distances
from tests.core.span_maker import gateway_call, span
from tests.trainer.rollout_maker import call, reward_on, trajectory

ROLES = st.sampled_from(["planner", "executor", "critic"])
BRANCHES = st.lists(st.lists(ROLES, min_size=1, max_size=4), min_size=1, max_size=4)


def timed(made: Span, start: int, end: int) -> Span:
    return replace(made, start_ns=start, end_ns=end)


def root() -> Span:
    return timed(span("agl.rollout"), 0, 1000)


def made_call(role: str, parent: Span, start: int, end: int) -> Span:
    return timed(gateway_call(parent=parent, role=role), start, end)


def distances_of(*spans: Span) -> dict[str, Distance]:
    """Distance of each call by span id."""
    calls = build_trajectory(spans).calls
    return dict(zip((call.span_id for call in calls), distances(calls), strict=True))


def handoffs(roles: Sequence[str]) -> int:
    return sum(one != other for one, other in pairwise(roles))


def fan_out(branches: Sequence[Sequence[str]], order: Sequence[int]) -> list[Span]:
    """A planner, parallel branches that begin together, and an editor. `order`: whose call starts or ends next."""
    whole = root()
    spans = [whole, made_call("planner", whole, 1, 5)]
    parents = [timed(span("branch", parent=whole), 10, 900) for _ in branches]
    moments: list[list[int]] = [[] for _ in branches]
    for place, index in enumerate(order):
        moments[index].append(11 + place)
    for parent, roles, times in zip(parents, branches, moments, strict=True):
        begins, ends = times[::2], times[1::2]
        spans += [made_call(*made) for made in zip(roles, [parent] * len(roles), begins, ends, strict=True)]
    return [*spans, *parents, made_call("editor", whole, 901, 950)]


@given(BRANCHES, st.data())
def test_branches_may_run_in_any_order(branches: list[list[str]], data: st.DataObject) -> None:
    events = [index for index, roles in enumerate(branches) for _ in range(2 * len(roles))]
    order = data.draw(st.permutations(events))
    found = list(distances_of(*fan_out(branches, order)).values())
    rests = [[*roles[place:], "editor"] for roles in branches for place in range(len(roles))]
    whole = [["planner", *roles, "editor"] for roles in branches]
    first = Distance(max(map(handoffs, whole)), max(map(len, whole)) - 1)
    expected = [first, *(Distance(handoffs(rest), len(rest) - 1) for rest in rests), Distance()]
    assert sorted(found) == sorted(expected)


@given(st.lists(ROLES, min_size=1, max_size=6), st.data())
def test_overlapping_calls_may_start_and_end_in_any_order(roles: list[str], data: st.DataObject) -> None:
    """All calls are children of one span, so only their times say what they follow."""
    whole = root()
    starts, ends = (data.draw(st.permutations(range(len(roles)))) for _ in range(2))
    spans = [
        made_call(role, whole, 100 + start, 200 + end) for role, start, end in zip(roles, starts, ends, strict=True)
    ]
    first, last = made_call("planner", whole, 1, 5), made_call("editor", whole, 300, 400)
    found = distances_of(whole, first, *spans, last)
    assert [found[one.span_id] for one in spans] == [Distance(1, 1)] * len(roles)
    assert found[first.span_id] == Distance(max(handoffs(["planner", role, "editor"]) for role in roles), 2)


@pytest.mark.parametrize("order", [[0, 0, 1, 1] * 3, [0] * 6 + [1] * 6, [1] * 6 + [0] * 6])
def test_seven_calls_interleaved_or_one_after_the_other_have_one_credit(order: list[int]) -> None:
    """In the order of their starts the planner has 6 or 2 hand-offs after it: 0.85^6 = 0.377, 0.85^2 = 0.722."""
    *spans, _ = fan_out([["executor"] * 3, ["critic"] * 3], order)
    found = list(distances_of(*spans).values())
    assert sorted(found) == [Distance(0, 0)] * 2 + [Distance(0, 1)] * 2 + [Distance(0, 2)] * 2 + [Distance(1, 3)]
    assert 0.85 ** found[0].handoffs == 0.85


def test_a_sub_agent_in_a_tool_stands_between_two_calls_of_its_caller() -> None:
    whole = root()
    agent = timed(span("agent", parent=whole), 1, 900)
    asked = made_call("planner", agent, 2, 10)
    tool = timed(span("tool", parent=agent), 11, 50)
    worked = made_call("executor", tool, 12, 40)
    answered = made_call("planner", agent, 60, 70)
    found = distances_of(whole, agent, tool, asked, worked, answered)
    assert [found[one.span_id] for one in (asked, worked, answered)] == [(2, 2), (1, 1), (0, 0)]


def test_without_a_common_ancestor_times_alone_decide() -> None:
    """The first call has no span of a framework, and the trace of the others began before its end."""
    agent = timed(span("agent", trace_id="c" * 32), 1, 900)
    asked = timed(gateway_call(role="planner"), 2, 10)
    found = distances_of(asked, agent, made_call("executor", agent, 20, 30))
    assert found[asked.span_id] == Distance(1, 1)


def test_choices_of_one_request_and_calls_of_no_duration_do_not_follow_each_other() -> None:
    whole = root()
    twins = [made_call(role, whole, 5, 5) for role in ("planner", "executor")]
    assert list(distances_of(whole, *twins).values()) == [Distance(), Distance()]


def test_the_worked_number_of_docs_10() -> None:
    calls = [call(role) for role in ("planner", "executor", "planner")]
    assert distances(trajectory("r", *calls, reward_on(None, 1.0)).calls) == [(2, 2), (1, 1), (0, 0)]
