"""OpenAI's Responses API: responses as its official client reads them, and requests to engines."""

import json
from typing import Any

import httpx
import openai
import pytest

from agl import semconv
from tests.core.fake_engine import WORDS
from tests.gateway.serving import LOGPROBS, Setup, assert_tokens, output

TOOL = {"type": "function", "name": "search", "parameters": {"type": "object"}, "strict": True}
TEXT = "".join(WORDS)


def create(setup: Setup, given: Any = "hi", **more: Any) -> Any:
    return setup.client().responses.create(model="writer@3", input=given, **more)


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_is_answered_and_recorded_with_ids(setup: Setup, stream: bool) -> None:
    if stream:
        *events, last = create(setup, stream=True)
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == TEXT
        assert last.type == "response.completed"
        answer = last.response
    else:
        answer = create(setup)
    assert (answer.output_text, answer.status, answer.model) == (TEXT, "completed", "writer@3")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (3, 3)
    span = setup.span()
    assert_tokens(span)
    assert span.text(semconv.GEN_AI_RESPONSE_ID) == answer.id
    assert json.loads(span.text(semconv.GATEWAY_REQUEST) or "")["input"] == "hi"
    assert json.loads(span.text(semconv.GATEWAY_CHANGED) or "")["messages"] == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_call_comes_back_as_an_item(setup: Setup, stream: bool) -> None:
    answer = create(setup, "TOOL", tools=[TOOL], tool_choice={"type": "function", "name": "search"}, stream=stream)
    if stream:
        *events, last = answer
        (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
        assert done.arguments == '{"x": 1}'
        answer = last.response
    (call,) = answer.output
    assert (call.type, call.call_id, call.name, call.arguments) == ("function_call", "call_1", "search", '{"x": 1}')
    (sent,) = setup.engine.seen
    function = {"name": "search", "parameters": {"type": "object"}, "strict": True}
    assert sent["tools"] == [{"type": "function", "function": function}]
    assert sent["tool_choice"] == {"type": "function", "function": {"name": "search"}}
    assert output(setup.span())["parts"][0]["type"] == "tool_call"


def test_the_client_s_stream_helper_accepts_every_event(setup: Setup) -> None:
    with setup.client().responses.stream(model="writer@3", input="TOOL", tools=[TOOL]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert final.output[0].type == "function_call"


def test_logprobs_are_returned_if_requested(setup: Setup) -> None:
    for stream in (False, True):
        answer: Any = create(setup, include=["message.output_text.logprobs"], top_logprobs=0, stream=stream)
        answer = list(answer)[-1].response if stream else answer
        assert [token.logprob for token in answer.output[0].content[0].logprobs] == LOGPROBS
    assert create(setup).output[0].content[0].logprobs == []


def test_a_conversation_is_sent_as_messages(setup: Setup) -> None:
    image = {"type": "input_image", "image_url": "data:image/png;base64,xx", "detail": "auto"}
    content = [{"type": "output_text", "text": "looking", "annotations": []}]
    create(
        setup,
        [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "input_text", "text": "what is it?"}, image]},
            {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "content": content},
            {"type": "function_call", "call_id": "c1", "name": "search", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "search", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "a mug"},
            {"role": "user", "content": "hi"},
        ],
        instructions="you are a shop",
        max_output_tokens=9,
        text={"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": True}},
    )
    (sent,) = setup.engine.seen
    calls = [{"id": c, "type": "function", "function": {"name": "search", "arguments": "{}"}} for c in ("c1", "c2")]
    shown = [
        {"type": "text", "text": "what is it?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,xx"}},
    ]
    assert sent["messages"] == [
        {"role": "system", "content": "you are a shop"},
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": shown},
        {"role": "assistant", "content": "looking", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "a mug"},
        {"role": "user", "content": "hi"},
    ]
    assert sent["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": {}, "strict": True},
    }
    assert sent["max_tokens"] == 9
    assert "input" not in sent and "text" not in sent


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"previous_response_id": "r"}, "the gateway keeps no state between calls, which previous_response_id needs"),
        ({"tools": [{"type": "web_search"}]}, "a tool of type web_search runs at a provider"),
        ({"given": [{"type": "item_reference", "id": "x"}]}, "no input item of type 'item_reference'"),
        ({"given": [{"role": "user"}]}, "not of the right form: KeyError: 'content'"),
    ],
)
def test_a_request_without_an_equivalent_chat_completion_is_refused(
    setup: Setup, more: dict[str, Any], reason: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=reason) as caught:
        create(setup, **more)
    assert caught.value.code == "not_translatable"
    assert setup.engine.seen == []


def test_errors_are_openais(setup: Setup) -> None:
    with pytest.raises(openai.NotFoundError, match="`nobody` does not exist"):
        setup.client().responses.create(model="nobody", input="hi")
    events = httpx.post(f"{setup.url}/v1/responses", json={"model": "base", "input": "BREAK", "stream": True}).text
    assert 'event: error\ndata: {"type":"error"' in events and "broke off" in events
    setup.store.refusing = True
    with pytest.raises(openai.InternalServerError, match="could not be recorded"):
        create(setup)
