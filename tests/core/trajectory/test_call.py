"""Calls read from joined spans: which spans are joined, and which of the two each field is read from."""

import json
from dataclasses import replace

import pytest

from agl import semconv
from agl.span import Span
from agl.tokens.packing import pack_ids, pack_logprobs
from agl.trajectory import Call, DropReason, build_trajectory
from tests.core.span_maker import OTHER_TRACE, ROLLOUT, chat, gateway_call, reward, span, tokens

DEEP = "[" * 100_000
"""JSON that Python cannot read, and not because it is not whole."""


def calls_of(*spans: Span) -> list[Call]:
    return build_trajectory(spans).calls


def test_a_gateway_span_below_an_http_span_joins_the_chat_span_above() -> None:
    asked = chat(attributes={semconv.ROLE: "planner"})
    http = span("POST", parent=asked)
    answered = gateway_call([1, 2], [3], parent=http, role="other")
    (call,) = calls_of(asked, http, answered)
    assert (call.span_id, call.chat_span_id, call.role) == (answered.span_id, asked.span_id, "planner")
    assert (call.prompt_ids, call.response_ids, call.logprobs) == ([1, 2], [3], [-0.5])
    assert (call.policy_version, call.finish_reason, call.rollout_id) == ("writer@3", "stop", ROLLOUT)


def test_a_call_has_the_times_and_the_place_of_the_framework_span() -> None:
    agent = span("invoke_agent planner")
    asked = chat(agent)
    answered = gateway_call(parent=asked)
    (call,) = calls_of(agent, asked, answered)
    assert (call.start_ns, call.end_ns) == (asked.start_ns, asked.end_ns)
    assert call.branches == tuple((one.span_id, one.start_ns) for one in (agent, asked))
    (alone,) = calls_of(agent, answered)
    assert (alone.end_ns, len(alone.branches)) == (answered.end_ns, 1)


def test_only_a_server_error_of_the_gateway_is_a_failure_of_the_engine() -> None:
    found = []
    for status in (400, 503):
        made = gateway_call(attributes={semconv.HTTP_RESPONSE_STATUS_CODE: status}, status="error")
        found += [call.engine_failed for call in calls_of(made)]
    assert found == [False, True]
    in_stream = gateway_call(
        attributes={semconv.HTTP_RESPONSE_STATUS_CODE: 200, semconv.ERROR_TYPE: "engine_error"}, status="error"
    )
    assert [call.engine_failed for call in calls_of(in_stream)] == [True]


def completion(parent: Span, text: object) -> Span:
    """LangChain's span for one of several prompts."""
    messages = json.dumps([{"role": "user", "parts": [{"type": "text", "content": text}]}])
    attributes = {semconv.GEN_AI_OPERATION_NAME: semconv.OPERATION_TEXT_COMPLETION}
    return span("text_completion writer", attributes | {semconv.GEN_AI_INPUT_MESSAGES: messages}, parent=parent)


@pytest.mark.parametrize("n", [1, 2])
def test_a_request_with_several_prompts_is_joined_with_the_span_of_each(n: int) -> None:
    """It is beside these spans. Prompts of one text have a span each; a prompt without a span is a call of its own."""
    agent = span("invoke_agent writer", {semconv.ROLE: "writer"})
    asked = [completion(agent, text) for text in ("b", "a", "a")]
    other = completion(agent, "never sent")
    request = {"prompt": ["a", "b", "a", "new"], "n": n}
    of_request = {semconv.GATEWAY_REQUEST: json.dumps(request)}
    answers = [
        gateway_call([1], [number], parent=agent, start=9, attributes=of_request | {semconv.GATEWAY_CHOICE: number})
        for number in range(4 * n)
    ]
    calls = {call.span_id: call for call in calls_of(agent, *asked, other, *answers)}
    expected = [asked[1], asked[0], asked[2], None]
    found = [calls.pop(answer.span_id).chat_span_id for answer in answers]
    assert found == [chat and chat.span_id for chat in expected for _ in range(n)]
    assert [call.chat_span_id for call in calls.values()] == [other.span_id]


@pytest.mark.parametrize("content", [{"type": "blob"}, ["a"], 1, None])
@pytest.mark.parametrize("n", [1, -1])
def test_a_prompt_that_is_no_text_and_a_wrong_number_of_choices_join_nothing(content: object, n: int) -> None:
    agent = span("invoke_agent writer", {semconv.ROLE: "writer"})
    request = {semconv.GATEWAY_REQUEST: json.dumps({"prompt": ["a", "b"], "n": n}), semconv.GATEWAY_CHOICE: 3}
    calls = calls_of(
        agent, completion(agent, content), completion(agent, "b"), gateway_call(parent=agent, attributes=request)
    )
    assert len(calls) == 3


@pytest.mark.parametrize(
    "attributes",
    [
        {semconv.GATEWAY_CHOICE: -3},
        {semconv.GEN_AI_RESPONSE_FINISH_REASONS: DEEP},
        {semconv.GATEWAY_DRIFT: DEEP},
        {semconv.GATEWAY_REQUEST: DEEP},
        {semconv.RESPONSE_TOKEN_IDS: DEEP},
    ],
)
def test_an_attribute_that_cannot_be_read_ends_nothing(attributes: dict[str, object]) -> None:
    (call,) = calls_of(gateway_call([1, 2], [3], attributes=attributes))
    assert call.choice == 0


def test_the_nearest_chat_span_is_joined() -> None:
    """Two instrumentations of one request: the framework's around the client library's."""
    outer = chat(attributes={semconv.ROLE: "planner"})
    inner = chat(parent=outer)
    (call,) = calls_of(outer, inner, gateway_call(parent=inner))
    assert (call.chat_span_id, call.role) == (inner.span_id, "planner")


def test_an_engine_span_below_the_gateway_span_is_not_a_second_call() -> None:
    answered = gateway_call(parent=chat())
    assert len(calls_of(answered, chat(parent=answered))) == 1


def test_the_response_id_joins_across_traces() -> None:
    asked = chat(attributes={semconv.GEN_AI_RESPONSE_ID: "chatcmpl-7", semconv.ROLE: "planner"})
    answered = gateway_call(trace_id=OTHER_TRACE, attributes={semconv.GEN_AI_RESPONSE_ID: "chatcmpl-7"})
    (call,) = calls_of(answered, asked)
    assert (call.chat_span_id, call.role, call.trace_id) == (asked.span_id, "planner", OTHER_TRACE)


def test_traceparent_takes_precedence_over_a_repeated_response_id() -> None:
    attributes = {semconv.GEN_AI_RESPONSE_ID: "same"}
    first, second = chat(attributes=attributes), chat(attributes=attributes)
    calls = calls_of(
        first,
        second,
        gateway_call(parent=second, attributes=attributes),
        gateway_call(parent=first, attributes=attributes),
    )
    assert {call.chat_span_id for call in calls} == {first.span_id, second.span_id}


def test_a_response_id_of_several_requests_joins_none_of_them_and_targets_none() -> None:
    """Engines make the id of an X-Request-Id, which a client may send with every call."""
    attributes = {semconv.GEN_AI_RESPONSE_ID: "same"}
    asked = [chat(attributes=attributes | {semconv.ROLE: role}) for role in ("planner", "executor")]
    answered = [gateway_call([n], [n], trace_id=f"{n:032x}", attributes=attributes) for n in (8, 9)]
    calls = calls_of(*asked, *answered, reward(1.0, {semconv.REWARD_TARGET: "same"}))
    assert [(call.role, call.through_gateway, call.rewards) for call in calls] == [
        ("planner", False, ()),
        ("executor", False, ()),
        ("writer", True, ()),
        ("writer", True, ()),
    ]
    reasons = [drop.reason for drop in build_trajectory([*asked, *answered]).drops]
    assert reasons == [DropReason.NO_IDS, DropReason.NO_IDS]


def test_the_choices_of_one_request_are_joined_by_their_response_id() -> None:
    attributes = {semconv.GEN_AI_RESPONSE_ID: "same"}
    asked = chat(attributes=attributes | {semconv.ROLE: "planner"})
    choices = [
        gateway_call([1], [n], trace_id=OTHER_TRACE, start=5, attributes=attributes | {semconv.GATEWAY_CHOICE: n})
        for n in (0, 1)
    ]
    assert [call.role for call in calls_of(asked, *choices)] == ["planner", "planner"]


def test_an_unjoined_span_is_a_separate_call() -> None:
    asked, answered = chat(), gateway_call(trace_id=OTHER_TRACE)
    from_framework, from_gateway = calls_of(asked, answered)
    assert (from_framework.span_id, from_framework.response_ids) == (asked.span_id, None)
    assert (from_gateway.span_id, from_gateway.chat_span_id) == (answered.span_id, None)
    assert (from_framework.through_gateway, from_gateway.through_gateway) == (False, True)


def test_choices_and_retries_of_one_request_are_separate_calls() -> None:
    asked = chat()
    failed = gateway_call(parent=asked, status="error", message="502")
    choices = [gateway_call([1], [i], parent=asked, attributes={semconv.GATEWAY_CHOICE: i}) for i in (2, 0, 1)]
    calls = calls_of(asked, failed, *choices)
    assert [call.error for call in calls] == ["502", None, None, None]
    assert len({call.span_id for call in calls}) == 4
    assert {call.choice: call.response_ids for call in calls[1:]} == {0: [0], 1: [1], 2: [2]}


@pytest.mark.parametrize("order", [1, -1])
def test_calls_at_the_same_time_are_ordered_independently_of_arrival(order: int) -> None:
    spans = [gateway_call(start=5), gateway_call(start=5), gateway_call(start=4)]
    expected = [spans[2].span_id, spans[0].span_id, spans[1].span_id]
    assert [call.span_id for call in calls_of(*spans[::order])] == expected


def test_calls_are_ordered_by_the_agents_clock_not_the_gateways() -> None:
    first, second = chat(start=10), chat(start=20)
    late = [gateway_call(parent=first, start=9), gateway_call(parent=second, start=1)]
    assert [call.chat_span_id for call in calls_of(first, second, *late)] == [first.span_id, second.span_id]


def roles(*, on_chat: str = "", on_agent: str = "", agent_name: str = "", on_gateway: str = "") -> str:
    agent = span("invoke_agent", {semconv.ROLE: on_agent, semconv.GEN_AI_AGENT_NAME: agent_name})
    asked = chat(parent=agent, attributes={semconv.ROLE: on_chat})
    (call,) = calls_of(agent, asked, gateway_call(parent=asked, role=on_gateway, version="policy@3"))
    return call.role


def test_the_role_is_the_frameworks_else_the_gateways_else_the_policys_name() -> None:
    everything = {"on_chat": "a", "on_agent": "b", "agent_name": "c", "on_gateway": "d"}
    assert roles(**everything) == "a"
    assert roles(**everything | {"on_chat": ""}) == "b"
    assert roles(agent_name="c", on_gateway="d") == "c"
    assert roles(on_gateway="d") == "d"
    assert roles() == "policy"


def test_an_unjoined_gateway_call_has_its_own_role_else_that_of_the_agent_above() -> None:
    agent = span("invoke_agent", {semconv.GEN_AI_AGENT_NAME: "executor"})
    named, unnamed = gateway_call(parent=agent, role="planner"), gateway_call(parent=agent)
    assert [call.role for call in calls_of(agent, named, unnamed)] == ["planner", "executor"]


def test_without_any_name_the_role_is_the_requested_model_or_default() -> None:
    asked, unnamed = chat(attributes={semconv.GEN_AI_REQUEST_MODEL: "writer@12"}), chat()
    assert [call.role for call in calls_of(asked, unnamed)] == ["writer", "default"]


@pytest.mark.parametrize(
    "attributes",
    [
        tokens([1, 2], [3, 4]),
        {
            semconv.PROMPT_TOKEN_IDS: [1, 2],
            semconv.RESPONSE_TOKEN_IDS: [3.0, 4.0],
            semconv.RESPONSE_LOGPROBS: [-0.5, -0.5],
        },
        {"prompt_token_ids": [1, 2], "response_token_ids": pack_ids([3, 4]), "response_logprobs": [-0.5, -0.5]},
        {
            "prompt_token_ids": "[1, 2]",
            "response_token_ids": "[3, 4]",
            "logprobs.content": json.dumps([{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -0.5}]),
        },
    ],
    ids=["packed", "arrays", "other names", "json"],
)
def test_token_ids_are_read_under_every_name_and_in_every_encoding(attributes: dict) -> None:
    (call,) = calls_of(chat(attributes=attributes))
    assert (call.prompt_ids, call.response_ids, call.logprobs) == ([1, 2], [3, 4], [-0.5, -0.5])
    assert (call.input_tokens, call.output_tokens, call.malformed) == (2, 2, None)


def test_the_gateways_token_ids_take_precedence() -> None:
    asked = chat(attributes=tokens([1], [2]))
    (call,) = calls_of(asked, gateway_call([1, 2, 3], [4], parent=asked))
    assert (call.prompt_ids, call.response_ids) == ([1, 2, 3], [4])


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({semconv.RESPONSE_TOKEN_IDS: b"\x01\x00\x00"}, "3 bytes"),
        ({semconv.RESPONSE_TOKEN_IDS: [0.5]}, "whole numbers"),
        ({semconv.RESPONSE_TOKEN_IDS: [float("inf")]}, "infinity"),
        ({semconv.RESPONSE_TOKEN_IDS: [-1]}, "-1"),
        ({semconv.RESPONSE_TOKEN_IDS: 7}, "int"),
        ({semconv.RESPONSE_TOKEN_IDS: "x"}, "Expecting value"),
        ({semconv.RESPONSE_TOKEN_IDS: "[null]"}, "NoneType"),
        ({semconv.RESPONSE_LOGPROBS: pack_logprobs([float("nan"), 0.0])}, "not finite"),
        ({semconv.RESPONSE_LOGPROBS: pack_logprobs([-1.0, 17.25])}, "a logprob is 17.25, expected at most 0"),
        ({semconv.RESPONSE_LOGPROBS: '["-0.5", -0.5]'}, "not logprobs"),
        ({semconv.TOKENS_FAULT: "two answers have the same index"}, "two answers have the same index"),
    ],
)
def test_invalid_token_ids_are_reported_and_never_partly_read(attributes: dict, said: str) -> None:
    (call,) = calls_of(chat(attributes=tokens([1], [2, 3]) | attributes))
    assert call.malformed is not None
    assert said in call.malformed
    assert (call.prompt_ids, call.response_ids, call.logprobs) == (None, None, None)


def test_token_counts_are_from_the_usage_if_there_are_no_ids() -> None:
    usage = {semconv.GEN_AI_USAGE_INPUT_TOKENS: 40, semconv.GEN_AI_USAGE_OUTPUT_TOKENS: 2}
    (call,) = calls_of(chat(attributes=usage))
    assert (call.input_tokens, call.output_tokens, call.response_ids) == (40, 2, None)


def test_counts_and_finish_reasons_are_read_under_other_names() -> None:
    openinference = {"llm.token_count.prompt": 40, "llm.token_count.completion": 2, "llm.finish_reason": "stop"}
    agentops = {"gen_ai.usage.prompt_tokens": 40, "gen_ai.usage.completion_tokens": 2}
    for attributes in (openinference, agentops | {"gen_ai.response.finish_reasons": '["stop"]'}):
        (call,) = calls_of(chat(attributes=attributes))
        assert (call.input_tokens, call.output_tokens, call.finish_reason) == (40, 2, "stop")


def test_the_policy_version_is_the_response_model_if_it_has_a_number() -> None:
    for model, version in (("writer@3", "writer@3"), ("gpt-5", None)):
        (call,) = calls_of(chat(attributes={semconv.GEN_AI_RESPONSE_MODEL: model}))
        assert call.policy_version == version


def test_an_error_of_either_span_is_the_error_of_the_call() -> None:
    asked = chat(status="error", message="TimeoutError: no answer")
    (call,) = calls_of(asked, gateway_call(parent=asked))
    assert call.error == "TimeoutError: no answer"
    (call,) = calls_of(chat(attributes={semconv.ERROR_TYPE: "502"}, status="error", message="engine gone"))
    assert call.error == "502: engine gone"


def test_a_reward_finds_its_call_by_response_id_or_by_either_span_id() -> None:
    asked = chat()
    answered = gateway_call(parent=asked, attributes={semconv.GEN_AI_RESPONSE_ID: "chatcmpl-7"})
    other = gateway_call()
    names = ["chatcmpl-7", asked.span_id, answered.span_id, "unknown"]
    rewards = [reward(value, {semconv.REWARD_TARGET: name}) for value, name in enumerate(names)]
    call, untouched = calls_of(asked, answered, other, *rewards)
    assert sorted(found.value for found in call.rewards) == [0, 1, 2]
    assert untouched.rewards == ()


def test_the_attempt_is_read_from_the_nearest_span_that_names_one() -> None:
    root = span(semconv.SPAN_ROLLOUT, {semconv.ATTEMPT_ID: "r-1-a2"})
    asked = chat(parent=root)
    (call,) = calls_of(root, asked, gateway_call(parent=asked))
    assert call.attempt_id == "r-1-a2"


def test_spans_that_are_their_own_ancestors_are_read() -> None:
    asked, agent = chat(), span("invoke_agent", {semconv.ROLE: "planner"})
    asked, agent = replace(asked, parent_id=agent.span_id), replace(agent, parent_id=asked.span_id)
    (call,) = calls_of(asked, agent)
    assert call.role == "planner"
