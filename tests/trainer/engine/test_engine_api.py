"""The engine's HTTP API, called by the clients that agents use."""

import json
from collections.abc import Iterator

import httpx
import pytest
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import APIError, AsyncOpenAI, OpenAI

from agl_trainer.data.tool_call import ToolCall, forced_start
from agl_trainer.engine.http.api import engine_app
from agl_trainer.engine.protocol import EngineError, EngineStoppedError
from tests.trainer.scripted_sampler import Script, ScriptedSampler, events, serving, small_tokenizer

TOKENIZER = small_tokenizer()
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
USER = [{"role": "user", "content": "hi"}]
PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
SUM = ToolCall("add", '{"a": 1, "b": 2}')


@pytest.fixture(scope="module")
def engine() -> Iterator[tuple[ScriptedSampler, str]]:
    sampler = ScriptedSampler(TOKENIZER)
    app = engine_app(sampler, TOKENIZER, served_name="base", max_model_len=512, default_max_tokens=128)
    with serving(app) as url:
        yield sampler, url


@pytest.fixture
def sampler(engine: tuple[ScriptedSampler, str]) -> ScriptedSampler:
    engine[0].reset()
    return engine[0]


@pytest.fixture
def url(engine: tuple[ScriptedSampler, str]) -> str:
    return engine[1]


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(url: str, body: object, path: str = "chat/completions", **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/{path}", content=json.dumps(body), headers=headers)


def chat(url: str, **parameters: object) -> dict:
    response = post(url, {"model": "writer", "messages": USER, **parameters})
    assert response.status_code == 200, response.text
    return response.json()


def stream(url: str, path: str = "chat/completions", **parameters: object) -> list[dict]:
    body = {"model": "writer", "stream": True, **parameters}
    with httpx.stream("POST", f"{url}/v1/{path}", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        return events(response.iter_lines())


def sent_ids(chunks: list[dict]) -> list[int]:
    """Token ids of a streamed answer with one choice."""
    return [token_id for chunk in chunks for token_id in chunk["choices"][0].get("token_ids", [])]


# --- chat


def test_an_answer(client: OpenAI, sampler: ScriptedSampler):
    (ids,) = sampler.say("hello there")
    answer = client.chat.completions.create(model="writer", messages=USER)
    assert answer.choices[0].message.content == "hello there"
    assert answer.choices[0].message.tool_calls is None
    assert (answer.choices[0].finish_reason, answer.model) == ("stop", "writer@3")
    assert answer.usage.prompt_tokens == len(sampler.ids(PROMPT))
    assert answer.usage.completion_tokens == len(ids)
    assert answer.usage.total_tokens == len(sampler.ids(PROMPT)) + len(ids)


def test_parameters_reach_the_sampler(client: OpenAI, sampler: ScriptedSampler):
    sampler.say("a", "b")
    client.chat.completions.create(
        model="writer@3", messages=USER, temperature=0.5, top_p=0.9, seed=7, max_completion_tokens=20, n=2
    )
    first, second = sampler.submitted
    assert first.prompt_ids == sampler.ids(PROMPT)
    assert first.model == "writer@3"
    assert (first.params.temperature, first.params.top_p, first.params.max_tokens) == (0.5, 0.9, 20)
    assert first.params.stop_token_ids == {END}
    assert (first.params.seed, second.params.seed) == (7, 8)


def test_defaults(url: str, sampler: ScriptedSampler):
    sampler.say("a")
    assert post(url, {"messages": USER, "temperature": None, "user": "me", "top_k": -1}).status_code == 200
    params = sampler.submitted[0].params
    assert sampler.submitted[0].model == "base"
    assert (params.temperature, params.top_p, params.seed, params.max_tokens) == (1.0, 1.0, None, 128)


def test_the_default_limit_shrinks_to_the_room_that_is_left(url: str, sampler: ScriptedSampler):
    sampler.say("a")
    long = "<|im_start|>" * 450
    chat(url, messages=[{"role": "user", "content": long}])
    submitted = sampler.submitted[0]
    assert submitted.params.max_tokens == 512 - len(submitted.prompt_ids) < 128


def test_token_ids_and_logprobs_are_in_vllms_fields(url: str, sampler: ScriptedSampler):
    (ids,) = sampler.say("é")
    answer = chat(url, return_token_ids=True, logprobs=True, top_logprobs=2)
    choice = answer["choices"][0]
    assert answer["prompt_token_ids"] == sampler.ids(PROMPT)
    assert choice["token_ids"] == ids and ids[-1] == END
    content = choice["logprobs"]["content"]
    assert [item["logprob"] for item in content] == [-(k + 1) / 8 for k in range(len(ids))]
    assert [item["token"] for item in content] == ["é", "<|im_end|>"]
    assert content[0]["bytes"] == list("é".encode())
    assert [item["logprob"] for item in content[0]["top_logprobs"]] == [-1.0, -2.0]
    assert content[0]["top_logprobs"][0]["token"] == TOKENIZER.decode([3])


def test_a_token_that_is_half_a_character_has_no_bytes(url: str, sampler: ScriptedSampler):
    (ids,) = sampler.say("🦜")
    answer = chat(url, logprobs=True)
    assert answer["choices"][0]["message"]["content"] == "🦜"
    assert [item["bytes"] for item in answer["choices"][0]["logprobs"]["content"][:-1]] == [None] * (len(ids) - 1)


def test_only_requested_fields_are_reported(url: str, sampler: ScriptedSampler):
    sampler.say("a", "a")
    answer = chat(url)
    assert "prompt_token_ids" not in answer
    assert "token_ids" not in answer["choices"][0] and answer["choices"][0]["logprobs"] is None
    assert not any("token_ids" in choice for chunk in stream(url, messages=USER) for choice in chunk["choices"])


def test_request_id_becomes_response_id(url: str, sampler: ScriptedSampler):
    sampler.say("a", "b", "c")
    assert post(url, {"messages": USER}, **{"X-Request-Id": "foo"}).json()["id"] == "chatcmpl-foo"
    assert post(url, {"prompt": "hi"}, "completions", **{"X-Request-Id": "foo"}).json()["id"] == "cmpl-foo"
    assert chat(url)["id"].startswith("chatcmpl-")


def test_length(url: str, sampler: ScriptedSampler):
    sampler.say("hello there")
    choice = chat(url, max_tokens=2, return_token_ids=True)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == TOKENIZER.decode(choice["token_ids"]) and len(choice["token_ids"]) == 2


def test_content_parts_and_the_developer_role(url: str, sampler: ScriptedSampler):
    sampler.say("a")
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    chat(url, messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}])
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n"
    assert TOKENIZER.decode(sampler.submitted[0].prompt_ids) == expected + "<|im_start|>assistant\n"


# --- stop strings


def test_a_stop_string_cuts_the_text_but_not_the_token_ids(url: str, sampler: ScriptedSampler):
    ids = sampler.ids("Action: x\nObservation: never seen")
    sampler.scripts.append(Script(ids, hangs=True))
    choice = chat(url, stop=["\nObs", "unused"], return_token_ids=True, logprobs=True)["choices"][0]
    assert choice["message"]["content"] == "Action: x"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "\nObs")
    sampled = choice["token_ids"]
    assert sampled == ids[: len(sampled)] and len(choice["logprobs"]["content"]) == len(sampled)
    assert "\nObs" in TOKENIZER.decode(sampled) and "\nObs" not in TOKENIZER.decode(sampled[:-1])
    assert sampler.submitted[0].cancelled.is_set() and sampler.submitted[0].played == len(sampled)


def test_a_streamed_answer_never_shows_the_start_of_a_stop_string(url: str, sampler: ScriptedSampler):
    sampler.scripts.append(Script(sampler.ids("ab\nObs\nObservation"), hangs=True))
    chunks = stream(url, messages=USER, stop="\nObservation", return_token_ids=True)
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(texts) == "ab\nObs"
    assert sent_ids(chunks) == sampler.ids("ab\nObs\nObservation")


def test_a_special_token_may_be_a_stop_string(url: str, sampler: ScriptedSampler):
    sampler.scripts.append(Script(sampler.ids("ab<|endoftext|>")))
    choice = chat(url, stop="<|endoftext|>")["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("ab", "stop")


# --- streaming


def test_a_stream_in_vllms_format(url: str, sampler: ScriptedSampler):
    (ids,) = sampler.say("hello 🦜")
    chunks = stream(url, messages=USER, return_token_ids=True, logprobs=True, stream_options={"include_usage": True})
    first, *middle, last, usage = chunks
    assert first["prompt_token_ids"] == sampler.ids(PROMPT)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["token_ids"] for chunk in middle] == [[token_id] for token_id in ids]
    assert [len(chunk["choices"][0]["logprobs"]["content"]) for chunk in middle] == [1] * len(ids)
    texts = [chunk["choices"][0]["delta"]["content"] for chunk in middle]
    assert "".join(texts) == "hello 🦜" and "\ufffd" not in "".join(texts)
    assert len([text for text in texts if text]) > 2
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == len(ids)
    assert {(chunk["id"], chunk["object"], chunk["model"]) for chunk in chunks} == {
        (first["id"], "chat.completion.chunk", "writer@3")
    }


def test_text_arrives_while_sampling_continues(client: OpenAI, sampler: ScriptedSampler):
    sampler.scripts.append(Script(sampler.ids("hello"), hangs=True))
    with client.chat.completions.create(model="writer", messages=USER, stream=True) as chunks:
        text = ""
        for chunk in chunks:
            text += chunk.choices[0].delta.content or ""
            if text == "hello":
                break
        assert not sampler.submitted[0].cancelled.is_set()


def test_n_choices(client: OpenAI, sampler: ScriptedSampler):
    ids = sampler.say("one", "another")
    answer = client.chat.completions.create(model="writer", messages=USER, n=2)
    assert [choice.message.content for choice in answer.choices] == ["one", "another"]
    assert answer.usage.completion_tokens == sum(map(len, ids))
    assert answer.usage.prompt_tokens == len(sampler.ids(PROMPT))
    assert sampler.submitted[0].params.seed is None


def test_n_choices_streamed(client: OpenAI, sampler: ScriptedSampler):
    sampler.say("one", "another")
    texts = ["", ""]
    finished = []
    for chunk in client.chat.completions.create(model="writer", messages=USER, n=2, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        finished += [choice.index] if choice.finish_reason else []
    assert texts == ["one", "another"] and sorted(finished) == [0, 1]


# --- tools


def test_a_tool_call(client: OpenAI, sampler: ScriptedSampler):
    sampler.say(f"I add.\n{SUM.text()}")
    choice = client.chat.completions.create(model="writer", messages=USER, tools=[ADD]).choices[0]
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments, call.type) == ("add", SUM.arguments, "function")
    assert (choice.message.content, choice.finish_reason) == ("I add.\n", "tool_calls")
    assert "You can call these tools" in TOKENIZER.decode(sampler.submitted[0].prompt_ids)


def test_only_a_call_means_no_content(client: OpenAI, sampler: ScriptedSampler):
    sampler.say(SUM.text())
    message = client.chat.completions.create(model="writer", messages=USER, tools=[ADD]).choices[0].message
    assert message.content is None and len(message.tool_calls) == 1


def test_streamed_tool_calls_accumulate(client: OpenAI, sampler: ScriptedSampler):
    sampler.say(f"I <add>.\n{SUM.text()}\n{SUM.text()}")
    with client.chat.completions.stream(model="writer", messages=USER, tools=[ADD]) as chunks:
        deltas = [event.delta for event in chunks if event.type == "content.delta"]
        choice = chunks.get_final_completion().choices[0]
    assert "".join(deltas) == choice.message.content == "I <add>.\n"
    assert len(deltas) > 2
    assert [call.function.arguments for call in choice.message.tool_calls] == [SUM.arguments] * 2
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert choice.finish_reason == "tool_calls"


def test_every_token_of_a_streamed_tool_call_is_reported(url: str, sampler: ScriptedSampler):
    (ids,) = sampler.say(SUM.text())
    chunks = stream(url, messages=USER, tools=[ADD], return_token_ids=True)
    assert sent_ids(chunks) == ids
    assert "<tool_call>" not in "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


@pytest.mark.parametrize("parameters", [{}, {"tools": [ADD], "tool_choice": "none"}])
def test_calls_stay_text_if_no_tool_is_offered(url: str, sampler: ScriptedSampler, parameters: dict):
    sampler.say(SUM.text())
    choice = chat(url, **parameters)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (SUM.text(), "stop")
    assert TOKENIZER.decode(sampler.submitted[0].prompt_ids) == PROMPT


def test_a_malformed_call_stays_text(url: str, sampler: ScriptedSampler):
    sampler.say("<tool_call>add 1 and 2</tool_call>")
    choice = chat(url, tools=[ADD])["choices"][0]
    assert choice["message"]["content"] == "<tool_call>add 1 and 2</tool_call>"
    assert "tool_calls" not in choice["message"] and choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("choice", "start"),
    [({"type": "function", "function": {"name": "add"}}, forced_start("add")), ("required", forced_start(None))],
)
def test_a_forced_call_is_started_in_the_prompt(url: str, sampler: ScriptedSampler, choice: object, start: str):
    sampler.say(SUM.text().removeprefix(start))
    answer = chat(url, tools=[ADD], tool_choice=choice, return_token_ids=True)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": SUM.arguments}
    assert TOKENIZER.decode(answer["prompt_token_ids"]).endswith(f"<|im_start|>assistant\n{start}")


def test_one_call_at_a_time(url: str, sampler: ScriptedSampler):
    sampler.say(SUM.text() * 3)
    assert len(chat(url, tools=[ADD], parallel_tool_calls=False)["choices"][0]["message"]["tool_calls"]) == 1


def test_a_conversation_with_tool_results(url: str, sampler: ScriptedSampler):
    sampler.say("3")
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": SUM.arguments}}
    turns = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c"}]
    chat(url, messages=[*USER, turns[0], turns[1] | {"content": "3"}], tools=[ADD])
    prompt = TOKENIZER.decode(sampler.submitted[0].prompt_ids)
    assert f"<|im_start|>assistant\n{SUM.text()}<|im_end|>" in prompt
    assert "<tool_response>\n3\n</tool_response>" in prompt


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def test_langchain_binds_tools(url: str, sampler: ScriptedSampler):
    model = ChatOpenAI(model="writer", base_url=f"{url}/v1", api_key="none", max_retries=0).bind_tools([add])
    sampler.say(SUM.text(), f"I add. {SUM.text()}", "3")
    asked = model.invoke("1 + 2?")
    assert [(call["name"], call["args"]) for call in asked.tool_calls] == [("add", {"a": 1, "b": 2})]
    streamed = list(model.stream("1 + 2?"))
    total = sum(streamed[1:], streamed[0])
    assert total.content == "I add. " and [call["args"] for call in total.tool_calls] == [{"a": 1, "b": 2}]
    result = add.invoke(asked.tool_calls[0])
    assert model.invoke([("user", "1 + 2?"), asked, result]).content == "3"
    assert f"{SUM.text()}<|im_end|>" in TOKENIZER.decode(sampler.submitted[2].prompt_ids)


# --- completions


@pytest.mark.parametrize("prompt", ["hi", ["hi"], TOKENIZER("hi")["input_ids"], [TOKENIZER("hi")["input_ids"]]])
def test_prompts_of_any_form(client: OpenAI, sampler: ScriptedSampler, prompt: object):
    sampler.say(" there")
    answer = client.completions.create(model="writer", prompt=prompt)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (" there", "stop")
    assert sampler.submitted[0].prompt_ids == sampler.ids("hi")


def test_several_prompts_with_n(client: OpenAI, sampler: ScriptedSampler):
    sampler.say("a", "b", "c", "d")
    answer = client.completions.create(model="writer", prompt=["hi", "hello"], n=2, seed=5)
    assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate("abcd"))
    assert [submitted.params.seed for submitted in sampler.submitted] == [5, 6, 5, 6]
    assert answer.usage.prompt_tokens == len(sampler.ids("hi")) + len(sampler.ids("hello"))


def test_completion_token_ids_and_logprobs_are_in_the_choice(url: str, sampler: ScriptedSampler):
    (ids,) = sampler.say("é!")
    body = {"prompt": "hi", "return_token_ids": True, "logprobs": 1}
    choice = post(url, body, "completions").json()["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (sampler.ids("hi"), ids)
    assert choice["logprobs"] == {
        "tokens": ["é", "!", "<|im_end|>"],
        "token_logprobs": [-0.125, -0.25, -0.375],
        "top_logprobs": [{TOKENIZER.decode([3]): -1.0, "é": -0.125}]
        + [{TOKENIZER.decode([3]): -1.0, text: logprob} for text, logprob in [("!", -0.25), ("<|im_end|>", -0.375)]],
        "text_offset": [0, 1, 2],
    }


def test_streamed_completion(url: str, sampler: ScriptedSampler):
    (ids,) = sampler.say("hello")
    chunks = stream(url, "completions", prompt="hi", return_token_ids=True, logprobs=0)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == "hello"
    assert sent_ids(chunks) == ids
    assert [choice.get("prompt_token_ids") for choice in choices] == [sampler.ids("hi")] + [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == "stop"
    offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
    assert offsets == sorted(offsets) and offsets[-1] == len("hello")


# --- cancelling


def test_closing_a_stream_cancels_every_choice(client: OpenAI, sampler: ScriptedSampler):
    sampler.scripts.extend([Script(sampler.ids("ab"), hangs=True)] * 2)
    with client.chat.completions.create(model="writer", messages=USER, n=2, stream=True) as chunks:
        next(iter(chunks))
    assert all(submitted.cancelled.wait(5) for submitted in sampler.submitted) and len(sampler.submitted) == 2


async def test_cancelling_a_request_cancels_its_generation(url: str, sampler: ScriptedSampler):
    sampler.scripts.append(Script(sampler.ids("ab"), hangs=True))
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=0.3) as client:
        with pytest.raises(APIError, match="timed out"):
            await client.chat.completions.create(model="writer", messages=USER)
    assert sampler.submitted[0].cancelled.wait(5)


def test_one_hanging_request_does_not_block_others(client: OpenAI, sampler: ScriptedSampler):
    sampler.scripts.append(Script([], hangs=True))
    with client.chat.completions.create(model="writer", messages=USER, stream=True):
        sampler.say("quick")
        quick = client.chat.completions.create(model="writer", messages=USER)
    assert quick.choices[0].message.content == "quick"


# --- models, health, errors


def test_models_and_health(client: OpenAI, url: str):
    assert [model.id for model in client.models.list()] == ["base", "writer", "writer@3"]
    assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.parametrize(
    ("parameters", "param", "says"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": None}, "messages", "required"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages", "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages", "needs content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "'hot'"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, None, "max_tokens and max_completion_tokens differ"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": 5}, "stop", "list"),
        ({"top_logprobs": 3}, None, "logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"stream_options": {"include_usage": True}}, None, "stream: true"),
        ({"tools": [{"type": "retrieval"}]}, "tools", "tools.0.type"),
        ({"tool_choice": "required"}, None, "no tools"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "mul"}}}, None, "'mul'"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "not supported"),
        ({"temprature": 1}, "temprature", "does not know"),
    ],
)
def test_the_error_names_an_invalid_parameter(
    url: str, sampler: ScriptedSampler, parameters: dict, param: str, says: str
):
    response = post(url, {"model": "writer", "messages": USER, **parameters})
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert says in error["message"] and not sampler.submitted


@pytest.mark.parametrize("prompt", [None, "", [], [[]], 5, ["a", 5], [400], [-1], {"a": 1}])
def test_an_invalid_prompt_is_rejected(url: str, sampler: ScriptedSampler, prompt: object):
    response = post(url, {"model": "writer", "prompt": prompt}, "completions")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    assert not sampler.submitted


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b"3", b"", b"[" * 100_000, b'{"messages": "\\ud800"}'])
def test_a_body_that_is_not_a_json_object(url: str, content: bytes):
    response = httpx.post(f"{url}/v1/chat/completions", content=content)
    assert response.status_code == 400 and "JSON" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "extra", [{"max_tokens": 512}, {"messages": [{"role": "user", "content": "<|im_end|>" * 600}]}]
)
def test_a_request_beyond_the_context_is_rejected(url: str, sampler: ScriptedSampler, extra: dict):
    response = post(url, {"messages": USER, **extra})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "512" in error["message"] and not sampler.submitted


def test_an_unknown_model(url: str, sampler: ScriptedSampler):
    response = post(url, {"model": "poet", "messages": USER})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert "writer" in response.json()["error"]["message"]


def test_an_unknown_path_or_method(url: str):
    assert httpx.get(f"{url}/v1/nothing").json()["error"]["message"] == "Not Found: GET /v1/nothing"
    assert httpx.get(f"{url}/v1/completions").status_code == 405


@pytest.mark.parametrize(("error", "status"), [(EngineError("out of memory"), 500), (EngineStoppedError("gone"), 503)])
def test_an_engine_that_fails(url: str, sampler: ScriptedSampler, error: EngineError, status: int):
    sampler.scripts.append(Script(sampler.ids("ab"), error))
    response = post(url, {"messages": USER})
    assert (response.status_code, response.json()["error"]["message"]) == (status, str(error))
    assert response.json()["error"]["type"] == "server_error"


def test_an_engine_that_fails_in_a_stream(client: OpenAI, sampler: ScriptedSampler):
    sampler.scripts += [Script(sampler.ids("ab"), EngineError("out of memory")), Script([], hangs=True)]
    with pytest.raises(APIError, match="out of memory"):
        list(client.chat.completions.create(model="writer", messages=USER, n=2, stream=True))
    assert sampler.submitted[1].cancelled.wait(5)


def test_a_failure_of_one_choice_ends_the_others(url: str, sampler: ScriptedSampler):
    sampler.scripts += [Script([], hangs=True), Script(sampler.ids("ab"), EngineError("out of memory"))]
    assert post(url, {"messages": USER, "n": 2}).status_code == 500
    assert sampler.submitted[0].cancelled.wait(5)
