"""Anthropic's Messages API over HTTP; `test_clients` runs its official client."""

import json
from typing import Any

import httpx
import pytest

from agl import semconv
from agl.gateway.dialect.messages import Messages
from agl.server.api_error import ApiError
from tests.core.fake_engine import WORDS, FakeEngine, rendered
from tests.gateway.serving import Setup, assert_tokens, gateway

TOOL = {"name": "search", "description": "finds", "input_schema": {"type": "object"}}
TEXT = "".join(WORDS)


def post(setup: Setup, content: Any = "hi", **more: Any) -> httpx.Response:
    body = {"model": "writer@3", "max_tokens": 9, "messages": [{"role": "user", "content": content}]} | more
    return setup.post(body, "/v1/messages")


def events(answer: httpx.Response) -> list[Any]:
    found = [event.split("\n") for event in answer.text.strip().split("\n\n")]
    data = [json.loads(line.removeprefix("data: ")) for _, line in found]
    assert [f"event: {one['type']}" for one in data] == [name for name, _ in found]
    return data


def test_a_text_is_answered_and_recorded_with_ids(setup: Setup) -> None:
    answer = post(setup, stop_sequences=["END"], top_k=3, metadata={"user_id": "u"})
    assert_tokens(setup.span())
    assert answer.json() == {
        "id": setup.span().text(semconv.GEN_AI_RESPONSE_ID),
        "type": "message",
        "role": "assistant",
        "model": "writer@3",
        "content": [{"type": "text", "text": TEXT}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 3, "output_tokens": 3},
    }
    (sent,) = setup.engine.seen
    assert (sent["stop"], sent["top_k"], sent["max_tokens"]) == (["END"], 3, 9)
    assert not {"stop_sequences", "metadata"} & sent.keys()


def test_a_stream_has_anthropics_events(setup: Setup) -> None:
    data = events(post(setup, stream=True))
    kinds = ["message_start", "content_block_start", *["content_block_delta"] * 3, "content_block_stop"]
    assert [event["type"] for event in data] == [*kinds, "message_delta", "message_stop"]
    assert data[0]["message"]["usage"] == {"input_tokens": 3, "output_tokens": 0}
    assert "".join(event["delta"]["text"] for event in data[2:5]) == TEXT
    assert data[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert data[-2]["usage"]["output_tokens"] == 3
    assert_tokens(setup.span())


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_used(setup: Setup, stream: bool) -> None:
    answer = post(setup, "TOOL", tools=[TOOL], tool_choice={"type": "tool", "name": "search"}, stream=stream)
    if stream:
        start, delta, stop, message, _ = events(answer)[1:]
        assert start["content_block"] == {"type": "tool_use", "id": "call_1", "name": "search", "input": {}}
        assert json.loads(delta["delta"]["partial_json"]) == {"x": 1}
        assert (start["index"], stop["index"], message["delta"]["stop_reason"]) == (0, 0, "tool_use")
    else:
        (block,) = answer.json()["content"]
        assert block == {"type": "tool_use", "id": "call_1", "name": "search", "input": {"x": 1}}
    (sent,) = setup.engine.seen
    function = {"name": "search", "description": "finds", "parameters": {"type": "object"}}
    assert sent["tools"] == [{"type": "function", "function": function}]
    assert sent["tool_choice"] == {"type": "function", "function": {"name": "search"}}


@pytest.mark.parametrize("field", ["stop_reason", "matched_stop"])
def test_a_stop_string_is_reported_by_vllm_and_sglang(field: str) -> None:
    call = Messages({"model": "m", "max_tokens": 9, "messages": []}, "m")
    response = {"id": "x", "choices": [{"message": {"content": "a"}, "finish_reason": "stop", field: "END"}]}
    call.capture.add(response)
    message = json.loads(call.render_message(response))
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")


def test_a_conversation_is_sent_as_chat_messages(setup: Setup) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "xx"}}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "a mug"}]}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "what?"}, image]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "looking"},
                {"type": "tool_use", "id": "c1", "name": "search", "input": {"q": 1}},
            ],
        },
        {"role": "user", "content": [result, {"type": "text", "text": "hi"}]},
    ]
    assert post(setup, messages=messages, system=[{"type": "text", "text": "be brief"}]).status_code == 200
    call = {"id": "c1", "type": "function", "function": {"name": "search", "arguments": '{"q": 1}'}}
    shown = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,xx"}}]
    assert setup.engine.seen[0]["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": shown},
        {"role": "assistant", "content": "looking", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c1", "content": "a mug"},
        {"role": "user", "content": "hi"},
    ]


def translated(**more: Any) -> Any:
    return Messages(
        {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]} | more, "m"
    ).request


def test_an_output_format_is_translated_and_edits_of_a_provider_s_history_are_left_out() -> None:
    schema = {"type": "object"}
    config = {"format": {"type": "json_schema", "schema": schema}, "effort": "low"}
    sent = translated(output_config=config, context_management={"edits": [{"type": "clear_thinking_20251015"}]})
    wanted = {"type": "json_schema", "json_schema": {"name": "output", "schema": schema}}
    assert (sent["response_format"], sent["reasoning_effort"]) == (wanted, "low")
    assert not {"output_config", "context_management"} & sent.keys()


@pytest.mark.parametrize("kind", ["text", "image", "document", "search_result"])
def test_content_of_a_tool_result_is_sent_or_refused_by_name(kind: str) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": "xx"}
    block = {"type": kind, "text": "a mug", "source": source}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [block]}
    messages = [{"role": "user", "content": [result]}]
    if kind in ("document", "search_result"):
        with pytest.raises(ApiError, match=f"of type '{kind}' is refused"):
            translated(messages=messages)
        return
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,xx"}}]
    (message,) = translated(messages=messages)["messages"]
    assert message == {"role": "tool", "tool_call_id": "t", "content": "a mug" if kind == "text" else image}


@pytest.mark.parametrize("finish_reason", ["stop", "tool_calls", "function_call"])
def test_an_answer_with_tool_calls_stops_for_them(finish_reason: str) -> None:
    """Engines report `stop` for a call that `tool_choice` names."""
    call = Messages({"model": "m", "max_tokens": 9, "messages": []}, "m")
    made = {"id": "c1", "type": "function", "function": {"name": "search", "arguments": "{}"}}
    response = {"id": "x", "choices": [{"message": {"tool_calls": [made]}, "finish_reason": finish_reason}]}
    call.capture.add_whole(response)
    assert json.loads(call.render_message(response))["stop_reason"] == "tool_use"


@pytest.mark.parametrize("arguments", ["{", "[" * 100_000])
def test_arguments_that_cannot_be_read_as_json_are_passed_on_as_text(arguments: str) -> None:
    call = Messages({"model": "m", "max_tokens": 9, "messages": []}, "m")
    made = {"id": "c1", "type": "function", "function": {"name": "search", "arguments": arguments}}
    response = {"id": "x", "choices": [{"message": {"tool_calls": [made]}, "finish_reason": "tool_calls"}]}
    call.capture.add_whole(response)
    assert json.loads(call.render_message(response))["content"][-1]["input"] == {"arguments": arguments}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (
            {"output_config": {"task_budget": 1}},
            "output_config.task_budget is refused: engines have no budget",
        ),
        ({"output_config": {"new": 1}}, "output_config.new is refused: engines have nothing like it"),
        ({"mcp_servers": [{}]}, "mcp_servers is refused: it runs at a provider"),
        ({"tools": [{"type": "web_search_20250305", "name": "web"}]}, "the tool 'web' runs at a provider"),
        ({"tools": [TOOL | {"input_examples": [{}]}]}, "tools[].input_examples is refused"),
        ({"content": [{"type": "document"}]}, "content[] of type 'document' is refused: engines read no documents"),
        ({"content": [{"type": "image", "source": {"type": "file"}}]}, "source of type 'file' is refused"),
        ({"content": [{"type": "tool_result", "tool_use_id": "c", "content": [{"type": "tool_use"}]}]}, "not allowed"),
        ({"messages": 3}, "not of the right form"),
    ],
)
def test_a_request_without_an_equivalent_chat_completion_is_refused(
    setup: Setup, more: dict[str, Any], reason: str
) -> None:
    answer = post(setup, **more)
    assert answer.status_code == 400
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert reason in answer.json()["error"]["message"]
    assert setup.engine.seen == []


def test_thoughts_that_were_cut_short_stay_in_the_conversation() -> None:
    thought = {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}]}
    user = {"role": "user", "content": "hi"}
    assistant = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    assert translated(messages=[user, thought, user])["messages"] == [user, assistant, user]


def test_a_prompt_s_tokens_are_counted_without_a_call(setup: Setup) -> None:
    body = {"model": "writer@3", "messages": [{"role": "user", "content": "hi"}]}
    counted = setup.post(body, "/v1/messages/count_tokens")
    assert (counted.status_code, counted.json()) == (200, {"input_tokens": len(rendered(body["messages"]))})
    refused = setup.post(body | {"mcp_servers": [{}]}, "/v1/messages/count_tokens")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "not_translatable")
    assert setup.store.appended == [] and setup.engine.seen == []


def test_an_engine_without_a_tokenizer_counts_no_tokens() -> None:
    with gateway(FakeEngine(tokenizes=False)) as setup:
        answer = setup.post({"model": "base", "messages": []}, "/v1/messages/count_tokens")
    assert (answer.status_code, answer.json()["error"]["code"]) == (501, "no_tokenizer")


def test_errors_are_anthropics(setup: Setup) -> None:
    answer = post(setup, model="nobody")
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")
    assert "`nobody` does not exist" in answer.json()["error"]["message"]
    last = events(post(setup, "BREAK", stream=True))[-1]
    assert last["type"] == "error" and "broke off" in last["error"]["message"]
    assert setup.store.appended[-1].text(semconv.ERROR_TYPE) == "engine_error"
