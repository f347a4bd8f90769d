"""Calls whose tokens were not sampled from the distribution that the trainer computes."""

from dataclasses import replace

import pytest

from agl import semconv
from agl.span import Span
from agl.trajectory import Call, DropReason, build_trajectory, sampling_fault
from tests.core.span_maker import chat, gateway_call, tokens


def made(**attributes: object) -> Call:
    (call,) = build_trajectory([gateway_call(attributes=attributes)]).calls
    return call


def reason(call: Call) -> DropReason | None:
    fault = sampling_fault(call)
    return fault and fault[0]


@pytest.mark.parametrize(
    ("temperature", "expected"), [(0.0, DropReason.GREEDY), (1e-6, DropReason.GREEDY), (0.1, None)]
)
def test_a_greedy_call_has_no_policy_gradient(temperature: float, expected: DropReason | None) -> None:
    assert reason(made(**{semconv.GEN_AI_REQUEST_TEMPERATURE: temperature})) == expected
    assert reason(made()) is None


def test_a_constrained_call_names_its_fields_and_what_to_do() -> None:
    call = made(**{semconv.GATEWAY_CONSTRAINTS: ["top_p", "response_format"]})
    assert call.constraints == ("top_p", "response_format")
    fault = sampling_fault(call)
    assert fault is not None and fault[0] == DropReason.CONSTRAINED
    assert fault[1].startswith("top_p, response_format kept the engine from sampling the model's full distribution")
    assert "ask for the format in the prompt" in fault[1]


def test_a_call_trains_where_its_limits_are_declared() -> None:
    call = made(**{semconv.GATEWAY_SAMPLING: '{"top_p":0.9}'})
    assert reason(call) is None
    assert sampling_fault(call, {"top_p": 0.9}) is None
    for declared in ({}, {"top_p": 0.8}, {"top_p": 0.9, "top_k": 5}):
        fault = sampling_fault(call, declared)
        assert fault is not None and fault[0] == DropReason.CONSTRAINED
        assert fault[1].startswith(f"it was sampled with {{'top_p': 0.9}}, but this training accounts for {declared}")
    assert made(**{semconv.GATEWAY_SAMPLING: "[3"}).sampling == {}


def test_such_a_call_is_in_a_row_because_sft_trains_on_it() -> None:
    asked = chat()
    trajectory = build_trajectory(
        [asked, gateway_call(parent=asked, attributes={semconv.GATEWAY_CONSTRAINTS: ["response_format"]})]
    )
    assert len(trajectory.rows) == 1 and not trajectory.drops


def views(first: int = 1, second: int = 1) -> tuple[Span, Span]:
    """The spans of two instrumentors, that of ours with a role, which start at these seconds and take a quarter."""
    answer = {semconv.GEN_AI_RESPONSE_ID: "chatcmpl-1", **tokens([1, 2], [3])}
    ours = chat(attributes=answer | {semconv.ROLE: "planner"}, start=first * 10**9)
    theirs = chat(attributes=answer, start=second * 10**9 + 1000)
    return replace(ours, scope="agl_langchain"), replace(theirs, scope="openinference")


def test_the_span_of_a_second_instrumentor_is_no_call() -> None:
    ours, theirs = views()
    for spans in ([ours, theirs], [theirs, ours]):
        trajectory = build_trajectory(spans)
        assert [(call.role, call.span_id) for call in trajectory.calls] == [("planner", ours.span_id)]
        assert trajectory.drops == []
    answered = replace(gateway_call(parent=theirs), attributes={semconv.GEN_AI_RESPONSE_ID: "chatcmpl-1"})
    assert [call.chat_span_id for call in build_trajectory([ours, theirs, answered]).calls] == [theirs.span_id]


def test_an_answer_from_a_cache_is_a_call_that_does_not_train() -> None:
    later = build_trajectory([*views(1, 2)])
    assert [drop.reason for drop in later.drops] == [DropReason.REPEATED_ANSWER]
    marked = build_trajectory([chat(attributes={semconv.RESPONSE_CACHED: True})])
    (drop,) = marked.drops
    assert drop.reason == DropReason.REPEATED_ANSWER and drop.detail.startswith("a cache in the agent answered")
