"""OpenAI's Responses API: responses as its official client reads them, and requests to engines."""

import json
from typing import Any

import httpx
import openai
import pytest

from agl import semconv
from agl.gateway.dialect.responses import Responses
from tests.core.fake_engine import WORDS, rendered
from tests.gateway.serving import LOGPROBS, Setup, assert_tokens, output, stream_through

TOOL = {"type": "function", "name": "search", "parameters": {"type": "object"}, "strict": True}
TEXT = "".join(WORDS)
CUSTOM = {"type": "custom", "name": "patch", "description": "edits a file"}
USER = [{"role": "user", "content": "hi"}]
THOUGHT = {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}


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


@pytest.mark.parametrize("stream", [False, True])
def test_a_custom_tool_is_a_function_with_one_text(stream: bool) -> None:
    earlier = {"type": "custom_tool_call", "call_id": "c0", "name": "patch", "input": 'a "b"'}
    done = {"type": "custom_tool_call_output", "call_id": "c0", "output": "done"}
    choice = {"type": "custom", "name": "patch"}
    body = {"model": "m", "input": [*USER, earlier, done], "tools": [CUSTOM], "tool_choice": choice, "stream": stream}
    call = Responses(body, "m")
    (tool,) = call.request["tools"]
    assert tool["function"]["parameters"]["required"] == ["input"]
    assert call.request["tool_choice"] == {"type": "function", "function": {"name": "patch"}}
    assistant, result = call.request["messages"][1:]
    assert assistant["tool_calls"][0]["function"] == {"name": "patch", "arguments": '{"input": "a \\"b\\""}'}
    assert result == {"role": "tool", "tool_call_id": "c0", "content": "done"}

    answer = [{"id": "c1", "function": {"name": "patch", "arguments": '{"input": "x'}}]
    rest = [{"function": {"arguments": '\\ny"}'}}]
    if stream:
        events = stream_through(call, [{"tool_calls": answer}, {"tool_calls": rest}])
        (delta,) = [event for event in events if event["type"] == "response.custom_tool_call_input.delta"]
        (finished,) = [event for event in events if event["type"] == "response.custom_tool_call_input.done"]
        assert delta["delta"] == finished["input"] == "x\ny"
        (item,) = events[-1]["response"]["output"]
    else:
        answer[0]["function"]["arguments"] += rest[0]["function"]["arguments"]
        response = {"choices": [{"message": {"tool_calls": answer}, "finish_reason": "stop"}]}
        call.capture.add_whole(response)
        (item,) = json.loads(call.render_message(response))["output"]
    assert (item["type"], item["call_id"], item["input"]) == ("custom_tool_call", "c1", "x\ny")


def test_thoughts_that_were_cut_short_stay_in_the_conversation() -> None:
    call = Responses({"model": "m", "input": [*USER, THOUGHT, *USER]}, "m")
    assistant = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    assert call.request["messages"] == [*USER, assistant, *USER]


def test_style_and_detail_are_passed_on() -> None:
    image = {"type": "input_image", "image_url": "data:,x", "detail": "high"}
    body = {
        "input": [{"role": "user", "content": [image]}],
        "text": {"verbosity": "low"},
        "reasoning": {"effort": "high"},
    }
    sent = Responses({"model": "m"} | body, "m").request
    assert (sent["verbosity"], sent["reasoning_effort"]) == ("low", "high")
    assert sent["messages"][0]["content"][0]["image_url"] == {"url": "data:,x", "detail": "high"}


def test_a_prompt_s_tokens_are_counted_without_a_call(setup: Setup) -> None:
    counted = setup.client().responses.input_tokens.count(model="writer@3", input="hi")
    assert (counted.input_tokens, setup.engine.seen) == (len(rendered(USER)), [])


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
        ({"previous_response_id": "r"}, "previous_response_id is refused: the gateway keeps no state"),
        ({"tools": [{"type": "web_search"}]}, "of type 'web_search' is refused"),
        ({"tools": [CUSTOM | {"format": {"type": "grammar"}}]}, "custom tool 'patch' has the format grammar"),
        ({"given": [{"type": "item_reference", "id": "x"}]}, "of type 'item_reference' is refused: the gateway keeps"),
        ({"given": [THOUGHT]}, "a reasoning item is without the message or the call that it led to"),
        ({"given": [THOUGHT | {"encrypted_content": "x"}, *USER]}, "encrypted_content is refused: engines cannot read"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode is refused"),
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
