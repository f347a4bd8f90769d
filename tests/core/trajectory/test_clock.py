"""Rollouts over several processes with clock skew: the order of spans is the same as without skew."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agl import semconv
from agl.span import Span
from agl.trajectory import build_trajectory
from agl.trajectory.join import in_one_clock
from tests.core.span_maker import chat, gateway_call, reward, span

S = 10**9
HOUR_NS = 3600 * S
SKEWS = st.integers(-HOUR_NS, HOUR_NS)


def at(made: Span, process: str | None, start_s: float, end_s: float, kind: int = 1) -> Span:
    """`made` with these times, in this process; None is the gateway's, which has no resource attributes."""
    resource = {"service.name": "agent", "service.instance.id": process} if process else {}
    return replace(made, start_ns=int(start_s * S), end_ns=int(end_s * S), resource=resource, kind=kind)


def team() -> list[Span]:
    """A planner calls two executors on other hosts, one after the other; all call the model through a gateway."""
    root = at(span(semconv.SPAN_ROLLOUT), "a", 0, 100)
    plan = at(chat(root, {semconv.ROLE: "planner"}), "a", 1, 9)
    spans = [root, plan, at(gateway_call([1], [2], parent=plan), None, 2, 8)]
    for number, process in enumerate("bc"):
        begin = 20 + 30 * number
        request = at(span("POST", parent=root), "a", begin, begin + 20, kind=3)
        serve = at(span("serve", parent=request), process, begin + 1, begin + 19, kind=2)
        work = at(chat(serve, {semconv.ROLE: f"executor-{process}"}), process, begin + 2, begin + 12)
        call = at(gateway_call([10 + number], [3], parent=work), None, begin + 3, begin + 11)
        spans += [request, serve, work, call, at(reward(0.1 * number, parent=serve), process, begin + 15, begin + 16)]
    check = at(chat(root, {semconv.ROLE: "planner"}), "a", 80, 90)
    spans += [check, at(gateway_call([5], [6], parent=check), None, 81, 89)]
    return [*spans, at(reward(1.0, parent=root), "a", 95, 96)]


def skew(spans: list[Span], by_ns: dict[str | None, int]) -> list[Span]:
    """`spans` as recorded if the clock of each process were wrong by these nanoseconds."""
    offsets = [by_ns.get(one.resource.get("service.instance.id"), 0) for one in spans]  # type: ignore[arg-type]
    return [
        replace(one, start_ns=one.start_ns + by + HOUR_NS, end_ns=one.end_ns + by + HOUR_NS)
        for one, by in zip(spans, offsets, strict=True)
    ]


def order_and_rewards(spans: list[Span]) -> tuple[list[str], float | None, list[float]]:
    """Roles of the calls in order, the rollout's reward, and all rewards in order."""
    trajectory = build_trajectory(spans)
    assert not trajectory.drops
    return [call.role for call in trajectory.calls], trajectory.reward, [one.value for one in trajectory.rewards]


@given(SKEWS, SKEWS, SKEWS)
def test_skewed_clocks_change_neither_order_nor_reward(gateway: int, first: int, second: int) -> None:
    spans = team()
    roles = ["planner", "executor-b", "executor-c", "planner"]
    assert order_and_rewards(spans) == (roles, 1.0, [0.0, 0.1, 1.0])
    assert order_and_rewards(skew(spans, {None: gateway, "b": first, "c": second})) == (roles, 1.0, [0.0, 0.1, 1.0])


def test_clocks_that_agree_are_not_shifted() -> None:
    spans = team()
    assert in_one_clock(spans) == spans


@pytest.mark.parametrize("skew_s", [-600, 600])
def test_the_clock_of_a_gateway_span_joined_by_response_id_is_shifted_to_the_request(skew_s: int) -> None:
    answer = {semconv.GEN_AI_RESPONSE_ID: "a"}
    request = at(chat(attributes=answer), "a", 1000, 1010)
    call = at(gateway_call(attributes=answer, trace_id="c" * 32), None, 1002 + skew_s, 1008 + skew_s)
    request_now, call_now = in_one_clock([request, call])
    assert request_now == request
    assert request.start_ns <= call_now.start_ns < call_now.end_ns <= request.end_ns


def test_a_span_that_outlives_its_cause_does_not_count_as_skew() -> None:
    """A queued task, or a request that the client abandoned while the gateway continued."""
    hand = at(span("enqueue"), "a", 0, 1)
    work = at(span("work", parent=hand), "b", 500, 600)
    asked = at(chat(hand), "a", 0, 1)
    call = at(gateway_call(parent=asked), None, 0, 300)
    assert in_one_clock([hand, work, asked, call]) == [hand, work, asked, call]


def test_the_order_within_a_process_is_kept() -> None:
    """All its spans are shifted by one offset, although each of them needs a different one."""
    root = at(span(semconv.SPAN_ROLLOUT), "a", 1000, 1100)
    calls = [at(gateway_call([number], [1], parent=root), None, number, number + 1) for number in (20, 10, 30)]
    moved = in_one_clock([root, *calls])[1:]
    assert [one.start_ns - moved[1].start_ns for one in moved] == [10 * S, 0, 20 * S]
    assert moved[1].start_ns == root.start_ns


def test_times_of_one_process_are_kept_even_if_a_child_starts_before_its_parent() -> None:
    parent = at(span("parent"), "a", 10, 20)
    child = at(span("child", parent=parent), "a", 5, 6)
    assert in_one_clock([parent, child]) == [parent, child]
