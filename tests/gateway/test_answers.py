"""What engines answer: whole and broken answers in each API, positions of choices and tool calls, ids and logprobs."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from agl import semconv
from agl.gateway.dialect.messages import Messages
from agl.gateway.dialect.responses import Responses
from agl.gateway.dialect.translated import Translated
from agl.tokens.capture import COMPLETE, Capture, Choice, Json
from agl.trajectory import DropReason, Trajectory, build_trajectory
from tests.gateway.scripted_engine import ScriptedEngine, answering, choice, envelope, streamed
from tests.gateway.serving import Setup, gateway, stream_through

USER = [{"role": "user", "content": "x"}]
REQUESTS: dict[str, Json] = {
    "chat/completions": {"messages": USER},
    "completions": {"prompt": "x"},
    "messages": {"messages": USER, "max_tokens": 9},
    "responses": {"input": "x"},
}
ERRORS = {
    "openai": {"error": {"message": "boom", "code": 502}},
    "text": {"error": "boom"},
    "flat": {"object": "error", "message": "boom", "code": 502},
    "fastapi": {"detail": "boom"},
}


@pytest.fixture(scope="module")
def served() -> Iterator[Setup]:
    with gateway(ScriptedEngine()) as setup:
        yield setup


@pytest.fixture
def setup(served: Setup) -> Setup:
    served.store.appended.clear()
    return served


def play(setup: Setup, script: ScriptedEngine) -> None:
    """Let the served engine answer as `script` does."""
    engine = setup.engine
    assert isinstance(engine, ScriptedEngine)
    engine.whole, engine.chunks, engine.breaks_off = script.whole, script.chunks, script.breaks_off
    engine.streams = script.streams


def post(setup: Setup, api: str = "chat/completions", **more: Any) -> httpx.Response:
    body = {"model": "base"} | REQUESTS[api] | more
    return setup.post(body, f"/rollout/r1/attempt/a1/v1/{api}")


def recorded(setup: Setup) -> Trajectory:
    return build_trajectory(setup.store.appended)


def assert_failed(setup: Setup, answer: httpx.Response, api: str, stream: bool, message: str) -> None:
    """The client gets an error in the form of its API and no end of an answer; the call does not train."""
    last = answer.text.strip().split("\n\n")[-1] if stream else answer.text
    name, _, data = last.rpartition("data: ")
    assert answer.status_code == (200 if stream else 502)
    body = json.loads(data)
    error = body if api == "responses" and stream else body["error"]
    assert message in error["message"] and error["code"] == "engine_error"
    assert name == ("event: error\n" if stream and api in ("messages", "responses") else "")
    assert not [end for end in ("[DONE]", "end_turn", "completed", "message_stop") if end in answer.text]
    trajectory = recorded(setup)
    ((call, reason, detail),) = [(drop.call, drop.reason, drop.detail) for drop in trajectory.drops]
    assert (reason, trajectory.rows, call.engine_failed) == (DropReason.FAILED_CALL, [], True)
    assert message in detail


# --- Whole answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", REQUESTS)
@pytest.mark.parametrize("reason", [None, "", "abort", "error", "of_a_kind_unknown"])
def test_an_answer_that_does_not_state_that_it_is_whole_is_a_failed_call(
    setup: Setup, reason: str | None, api: str, stream: bool
) -> None:
    play(setup, answering({"finish_reason": reason}))
    assert_failed(setup, post(setup, api, stream=stream), api, stream, f"the finish_reason {reason or None}")


@pytest.mark.parametrize("api", REQUESTS)
@pytest.mark.parametrize("chunks", [[], [envelope([streamed(choice()) | {"finish_reason": None}])]])
@pytest.mark.parametrize("breaks_off", [False, True])
def test_a_stream_that_ends_before_its_answer_is_a_failed_call(
    setup: Setup, api: str, chunks: list[Json], breaks_off: bool
) -> None:
    play(setup, ScriptedEngine(chunks=chunks, breaks_off=breaks_off))
    assert_failed(setup, post(setup, api, stream=True), api, True, "is not a whole answer")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", REQUESTS)
@pytest.mark.parametrize("form", ERRORS)
def test_an_error_inside_a_200_is_a_failed_call(setup: Setup, form: str, api: str, stream: bool) -> None:
    begun = envelope([streamed(choice()) | {"finish_reason": None}])
    play(setup, ScriptedEngine(whole=ERRORS[form], chunks=[begun, ERRORS[form]]))
    assert_failed(setup, post(setup, api, stream=stream), api, stream, "boom")


def test_an_event_that_is_named_error_is_a_failed_call(setup: Setup) -> None:
    play(setup, ScriptedEngine(chunks=['event: error\ndata: {"message": "boom"}\n\n']))
    assert_failed(setup, post(setup, stream=True), "chat/completions", True, "boom")


def test_an_error_of_the_request_inside_a_200_is_not_a_failure_of_the_engine(setup: Setup) -> None:
    play(setup, ScriptedEngine(whole={"error": {"message": "too long", "code": 400}}))
    answer = post(setup)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "400")
    assert [call.engine_failed for call in recorded(setup).calls] == [False]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", REQUESTS)
@pytest.mark.parametrize("reason", COMPLETE)
def test_every_finish_reason_of_a_whole_answer_is_passed_on_and_trains(
    setup: Setup, reason: str, api: str, stream: bool
) -> None:
    engine = answering({"finish_reason": reason})
    engine.breaks_off = True  # `[DONE]` adds nothing to a finish reason.
    play(setup, engine)
    answer = post(setup, api, stream=stream)
    assert answer.status_code == 200 and "error" not in answer.text.replace('"error":null', "").replace(
        '"error": null', ""
    )
    assert [row.token_ids for row in recorded(setup).rows] == [[1, 2, 3, 10, 11]]
    truncated = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(reason, "")
    assert truncated in answer.text or api != "responses"


# --- Positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indexes", [(0, 0), (None, None), ("0", "1"), (1, 0)])
def test_the_order_of_whole_choices_is_that_of_the_list_unless_their_indexes_tell_them_apart(
    setup: Setup,
    indexes: tuple[Any, ...],
) -> None:
    first, second = ({**choice(ids=ids), "index": index} for ids, index in zip([(10,), (20, 21)], indexes, strict=True))
    play(setup, answering(first, second))
    assert post(setup, n=2).status_code == 200
    rows = [row.token_ids for row in recorded(setup).rows]
    expected = [[1, 2, 3, 10], [1, 2, 3, 20, 21]]
    assert rows == (expected if indexes != (1, 0) else expected[::-1])


@pytest.mark.parametrize("indexes", [(0, 0), (None, None), (None, 1), ("0", "1"), (-1, 0)])
@pytest.mark.parametrize("at_once", [False, True])
def test_streamed_choices_that_cannot_be_told_apart_do_not_train(
    setup: Setup, indexes: tuple[Any, ...], at_once: bool
) -> None:
    parts = [streamed(choice(ids=ids)) | {"index": index} for ids, index in zip([(10,), (20,)], indexes, strict=True)]
    with gateway(
        ScriptedEngine(chunks=[envelope(parts)] if at_once else [envelope([part]) for part in parts])
    ) as setup:
        assert post(setup, n=2, stream=True).status_code == 200
        trajectory = recorded(setup)
    assert trajectory.rows == []
    assert {drop.reason for drop in trajectory.drops} == {DropReason.MALFORMED}


@pytest.mark.parametrize("body", [{"n": 2}, {"prompt": ["a", "b"]}, {"n": 2, "prompt": [[1], [2]]}])
@pytest.mark.parametrize("stream", [False, True])
def test_fewer_choices_than_requested_do_not_train(setup: Setup, body: Json, stream: bool) -> None:
    play(setup, answering({}))
    post(setup, "completions" if "prompt" in body else "chat/completions", stream=stream, **body)
    (drop,) = recorded(setup).drops
    assert drop.reason is DropReason.MALFORMED and "choices were requested, and 1 arrived" in drop.detail


def test_a_stream_of_one_choice_needs_no_index(setup: Setup) -> None:
    chunks = [streamed(choice()) | {"index": None, "finish_reason": None}, streamed(choice(ids=(12,)))]
    play(setup, ScriptedEngine(chunks=[envelope([chunk]) for chunk in chunks]))
    post(setup, stream=True)
    assert [row.token_ids for row in recorded(setup).rows] == [[1, 2, 3, 10, 11, 12]]


def call(index: int | None, call_id: str | None, name: str | None, arguments: str) -> Json:
    return {"index": index, "id": call_id, "function": {"name": name, "arguments": arguments}}


DELTAS = [
    [call(0, "a", "f", '{"x"'), call(0, None, None, ": 1}"), call(1, "b", "g", "{}")],
    [call(0, "a", "f", '{"x"'), call(1, "b", "g", "{"), call(0, None, None, ": 1}"), call(1, None, None, "}")],
    [call(1, "a", "f", '{"x"'), call(0, "b", "g", "{"), call(1, None, None, ": 1}"), call(0, None, None, "}")],
    [call(0, "a", "f", '{"x"'), call(0, None, None, ": 1}"), call(0, "b", "g", "{}")],
    [call(0, "a", "f", '{"x"'), call(0, "b", "g", "{"), call(0, "a", None, ": 1}"), call(0, "b", None, "}")],
    [call(None, "a", "f", '{"x"'), call(None, None, None, ": 1}"), call(None, "b", "g", "{}")],
    [
        call(None, "a", "f", '{"x"'),
        call(None, "b", "g", "{"),
        call(None, "a", "f", ": 1}"),
        call(None, "b", "g", "}"),
    ],
    [call(None, None, "f", '{"x"'), call(None, None, None, ": 1}"), call(None, None, "g", "{}")],
    [call(0, None, "f", '{"x": 1}'), call(0, None, "g", "{}")],
    [call(5, "a", "f", '{"x": 1}'), call(9, "b", "g", "{}")],
    [call(0, "a", "f", '{"x"'), call(0, "a", "f", ": 1}"), call(1, "b", "g", "{}")],
]
"""Two calls, also with one index, without index, and interleaved."""


@pytest.mark.parametrize("deltas", DELTAS)
def test_tool_calls_are_told_apart_by_index_id_and_name(deltas: list[Json]) -> None:
    capture = Capture()
    for delta in deltas:
        capture.add({"choices": [{"index": 0, "delta": {"tool_calls": [delta]}}]})
    calls = capture.choices()[0].tool_calls
    assert [(one.name, one.arguments) for one in calls] == [("f", '{"x": 1}'), ("g", "{}")]


def of_messages(events: list[Any]) -> list[Any]:
    """The content of a streamed message. A block ends before the next one starts."""
    blocks: list[Any] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"])
            blocks[-1]["text"] = ""
        elif event["type"] in ("content_block_delta", "content_block_stop"):
            assert event["index"] == len(blocks) - 1
            delta = event.get("delta", {})
            blocks[-1]["text"] += delta.get("partial_json") or delta.get("text") or ""
    return [(block.get("name"), block["text"]) for block in blocks]


def of_responses(events: list[Any]) -> list[Any]:
    """The output of a streamed response, whose items are added in their order."""
    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert [event["output_index"] for event in added] == list(range(len(added)))
    output = events[-1]["response"]["output"]
    return [(item.get("name"), item.get("arguments") or item["content"][0]["text"]) for item in output]


@pytest.mark.parametrize("deltas", DELTAS)
@pytest.mark.parametrize("dialect", [Messages, Responses])
def test_tool_calls_come_one_after_the_other_in_translated_streams(
    dialect: type[Translated], deltas: list[Json]
) -> None:
    request = {"model": "m", "messages": [], "input": "hi"}
    made: list[Json] = [{"tool_calls": [delta]} for delta in deltas]
    made.insert(1, {"content": "and"})
    events = stream_through(dialect(request, "m"), made)
    content = of_messages(events) if dialect is Messages else of_responses(events)
    assert sorted(content, key=str) == [("f", '{"x": 1}'), ("g", "{}"), (None, "and")]


def test_a_call_without_an_id_gets_one() -> None:
    """Its result must name it."""
    call = Messages({"model": "m", "messages": []}, "m")
    made = [{"function": {"name": "f", "arguments": "{}"}}] * 2
    call.capture.add_whole({"id": "x", "choices": [{"message": {"tool_calls": made}, "finish_reason": "stop"}]})
    found = [block["id"] for block in json.loads(call.render_message({}))["content"]]
    assert len(set(found)) == 2 and all(found)


@pytest.mark.parametrize("api", ["messages", "responses"])
def test_a_client_of_a_translated_api_gets_the_form_that_it_requested(setup: Setup, api: str) -> None:
    """Some engines answer a request for a stream, if it has tools, with a whole response."""
    script = answering({"message": {"content": "hi", "tool_calls": [call(None, "c", "f", "{}")]}})
    kinds = []
    for script.streams in (None, False):
        play(setup, script)
        answer = post(setup, api, stream=True)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert '"hi"' in answer.text
        kinds.append([line for line in answer.text.splitlines() if line.startswith("event: ")])
    assert kinds[0] == kinds[1] != []
    setup.store.appended.clear()
    script.streams = True
    play(setup, script)
    assert_failed(setup, post(setup, api), api, False, "is a stream, which was not requested")


THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}


@pytest.mark.parametrize(
    "message",
    [
        {"content": [THINKING, {"type": "text", "text": "hi"}]},  # Mistral
        {"content": "hi", "reasoning": "hm"},
    ],
)
@pytest.mark.parametrize("api", sorted(REQUESTS.keys() - {"completions"}))
@pytest.mark.parametrize("stream", [False, True])
def test_content_may_be_a_list_of_parts(setup: Setup, api: str, stream: bool, message: Json) -> None:
    play(setup, answering({"message": message}))
    answer = post(setup, api, stream=stream, thinking={"type": "enabled"})
    assert answer.status_code == 200 and "hi" in answer.text and "hm" in answer.text
    (span,) = setup.store.appended
    (recorded_message,) = json.loads(span.text(semconv.GEN_AI_OUTPUT_MESSAGES) or "")
    assert [part["content"] for part in recorded_message["parts"]] == ["hm", "hi"]


@pytest.mark.parametrize(
    ("made", "arguments"),
    [
        ([{"id": "c", "index": 0, "function": {"name": "f", "arguments": {"x": 1}}}], '{"x": 1}'),  # llama.cpp
        ({"id": "c", "index": 0, "function": {"name": "f", "arguments": '{"x": 1}'}}, '{"x": 1}'),  # TGI
        ([{"id": "c", "index": 0, "type": "custom", "custom": {"name": "f", "input": "hello"}}], "hello"),  # OpenAI
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls_of_different_engines_are_read(setup: Setup, stream: bool, made: Any, arguments: str) -> None:
    """Arguments as an object, one call without a list, and a custom tool."""
    play(setup, answering({"message": {"content": None, "tool_calls": made}}))
    answer = post(setup, "messages", stream=stream)
    assert answer.status_code == 200 and '"tool_use"' in answer.text
    (message,) = json.loads(setup.store.appended[0].text(semconv.GEN_AI_OUTPUT_MESSAGES) or "")
    assert message["parts"] == [{"type": "tool_call", "id": "c", "name": "f", "arguments": arguments}]


@pytest.mark.parametrize("details", [{"cached_tokens": 2}, [1], None])
def test_cached_tokens_are_passed_on_if_the_engine_states_them(setup: Setup, details: Any) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": details}
    play(setup, answering({}, usage=usage))
    found = post(setup, "responses").json()["usage"]["input_tokens_details"]
    assert found == {"cached_tokens": 2 if isinstance(details, dict) else 0}


@pytest.mark.parametrize("form", ["\ufeff{}{}", "{}: ping\n\n{}", "{}data:\n\n{}", "{}{}", "crlf"])
@pytest.mark.parametrize("end", ["data: [DONE]\n\n", "data: [DONE]\n", "data: [DONE]", "data:[DONE]\r\n\r\n"])
def test_a_stream_is_read_whatever_its_lines_look_like(setup: Setup, form: str, end: str) -> None:
    """A byte order mark, comments and empty data between the events, and a last event without a blank line."""
    whole = envelope([streamed(choice())])
    first, rest = (f"data: {json.dumps(chunk)}\n\n" for chunk in (whole | {"choices": []}, whole))
    text = (first + rest).replace("\n", "\r\n") if form == "crlf" else form.format(first, rest)
    play(setup, ScriptedEngine(chunks=[text, end], breaks_off=True))
    answer = post(setup, stream=True)
    assert "[DONE]" in answer.text.rstrip().splitlines()[-1]
    assert [row.token_ids for row in recorded(setup).rows] == [[1, 2, 3, 10, 11]]


@pytest.mark.parametrize("form", ["message", "delta"])
def test_a_refusal_and_a_call_in_the_form_before_tools_are_part_of_the_answer(form: str) -> None:
    capture = Capture()
    parts = [{"refusal": "I must"}, {"refusal": " not"}]
    parts += [{"function_call": {"name": "f", "arguments": '{"x"'}}, {"function_call": {"arguments": ": 1}"}}]
    if form == "message":
        whole = {"content": None, "refusal": "I must not", "function_call": {"name": "f", "arguments": '{"x": 1}'}}
        capture.add_whole({"choices": [{"message": whole}]})
    for part in parts if form == "delta" else ():
        capture.add({"choices": [{"index": 0, "delta": part}]})
    text, made = capture.choices()[0].message()["parts"]
    assert (text["content"], made["name"], made["arguments"]) == ("I must not", "f", '{"x": 1}')


@pytest.mark.parametrize(
    "delta", [{"content": "a"}, {"reasoning_content": "a"}, {"tool_calls": [call(0, "1", "f", "")]}]
)
def test_the_first_token_is_the_first_of_text_thoughts_and_calls(delta: Json) -> None:
    capture = Capture()
    for given, has_tokens in (({"role": "assistant", "content": ""}, False), (delta, True)):
        capture.add({"choices": [{"index": 0, "delta": given}]})
        assert capture.has_tokens is has_tokens


def test_calls_of_one_name_are_told_apart_by_their_whole_arguments() -> None:
    capture = Capture()
    for _ in range(2):
        capture.add({"choices": [{"index": 0, "delta": {"tool_calls": [call(0, None, "f", "{}")]}}]})
    assert [one.arguments for one in capture.choices()[0].tool_calls] == ["{}", "{}"]


# --- Ids, logprobs and usage -----------------------------------------------------------------------------------------

WRONG: list[Json] = [
    {"token_ids": [None, 11]},
    {"token_ids": [10.0, 11]},
    {"token_ids": [2**40, 11]},
    {"token_ids": [-1, 11]},
    {"token_ids": ["10", 11]},
    {"token_ids": "10"},
    {"token_ids": 10},
    {"prompt_token_ids": [None]},
    {"logprobs": {"content": [{"logprob": "-0.5"}, {"logprob": -0.5}]}},
    {"logprobs": {"content": [{"logprob": None}, {}]}},
    {"logprobs": {"content": ["-0.5", -0.5]}},
    {"logprobs": {"content": [{"logprob": 17.25}, {"logprob": -0.5}]}},
    {"logprobs": {"content": [{"logprob": 10**400}, {"logprob": -0.5}]}},
    {"logprobs": {"token_logprobs": [0.01, -0.5]}},
]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_id_or_no_logprob_is_recorded_once_and_does_not_train(
    setup: Setup, wrong: Json, stream: bool
) -> None:
    play(setup, answering(wrong))
    answer = post(setup, stream=stream)
    assert answer.status_code == 200 and "hi" in answer.text
    (drop,) = recorded(setup).drops
    assert len(setup.store.appended) == 1
    assert drop.reason is DropReason.MALFORMED


def test_a_logprob_that_rounding_lifts_above_0_trains(setup: Setup) -> None:
    play(setup, answering({"logprobs": {"content": [{"logprob": 1e-6}, {"logprob": 0}]}}))
    post(setup)
    assert len(recorded(setup).rows) == 1


ODD: list[Json] = [
    {"id": 7, "model": ["base"]},
    {"usage": {"completion_tokens": "many"}},
    {"usage": {"completion_tokens": 2**70}},
    {"usage": "none"},
    {"id": "\ud800"},
    {"choices": [choice() | {"finish_reason": ["stop"]}]},
    {"choices": [choice() | {"message": {"content": ["hi"]}}]},
    {"choices": [choice() | {"message": {"content": "\ud800"}}]},
    {"choices": [choice() | {"message": "hi"}]},
    {"choices": [[]]},
    {"choices": "none"},
    {"choices": [choice() | {"message": {"tool_calls": [{"function": "f"}]}}]},
]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("api", REQUESTS)
def test_a_call_is_recorded_once_whatever_its_answer_holds(setup: Setup, odd: Json, api: str) -> None:
    play(setup, ScriptedEngine(whole=envelope([choice()]) | odd))
    answer = post(setup, api)
    assert answer.status_code in (200, 502)
    assert isinstance(answer.json(), dict)
    assert len(recorded(setup).calls) == len(setup.store.appended) == 1


@pytest.mark.parametrize(
    ("usage", "message"),
    [
        ({"completion_tokens": 9}, "the engine counted 9 response tokens and returned 2 ids"),
        ({"completion_tokens": 1}, "the engine counted 1 response tokens and returned 2 ids"),
        ({"prompt_tokens": 4, "completion_tokens": 2}, "the engine counted 4 prompt tokens and returned 3 ids"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_ids_that_are_not_as_many_as_the_engine_counted_do_not_train(
    setup: Setup, usage: Json, message: str, stream: bool
) -> None:
    play(setup, answering({}, usage=usage))
    post(setup, stream=stream)
    assert (
        setup.span().attributes[semconv.GEN_AI_USAGE_OUTPUT_TOKENS] == usage["completion_tokens"]
        if "completion_tokens" in usage
        else 2
    )
    (drop,) = recorded(setup).drops
    assert drop.reason is DropReason.LENGTH_MISMATCH and message in drop.detail


@pytest.mark.parametrize(("counted", "rows"), [(4, 2), (5, 0)])
def test_the_usage_of_several_choices_is_compared_with_the_sum_of_their_ids(
    setup: Setup, counted: int, rows: int
) -> None:
    play(setup, answering({}, {}, usage={"completion_tokens": counted}))
    post(setup, n=2)
    trajectory = recorded(setup)
    assert (len(trajectory.rows), {drop.reason for drop in trajectory.drops}) == (
        rows,
        set() if rows else {DropReason.LENGTH_MISMATCH},
    )


@pytest.mark.parametrize(
    ("ids", "logprobs", "sampled"),
    [
        ([10, 11], [None, -1.0, -2.0, -0.5, -0.25], [-0.5, -0.25]),  # vLLM
        ([1, 2, 3, 10, 11], [None, -1.0, -2.0, -0.5, -0.25], [-0.5, -0.25]),
        ([10, 11], [-0.5, -0.25], None),
        ([1, 2, 3, 10, 11], [-1.0, -0.5, -0.25], None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_of_the_prompt_is_not_sampled(
    setup: Setup, stream: bool, ids: list[int], logprobs: list[Any], sampled: list[float] | None
) -> None:
    made = {"index": 0, "text": "x hi", "finish_reason": "stop", "token_ids": ids, "prompt_token_ids": [1, 2, 3]}
    made["logprobs"] = {"token_logprobs": logprobs}
    whole = {"id": "c", "object": "text_completion", "model": "base", "choices": [made]}
    play(setup, ScriptedEngine(whole=whole, chunks=[whole]))
    post(setup, "completions", echo=True, stream=stream)
    (call,) = recorded(setup).calls
    if sampled is None:
        assert call.malformed is not None and call.malformed.startswith("the answer echoes the prompt")
    else:
        assert (call.prompt_ids, call.response_ids, call.logprobs) == ([1, 2, 3], [10, 11], sampled)


def test_a_fault_is_on_the_span_in_place_of_the_tokens() -> None:
    assert Choice(0, token_ids=[1], fault="mixed up").token_attributes() == {semconv.TOKENS_FAULT: "mixed up"}
