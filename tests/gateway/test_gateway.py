"""The gateway over loopback, with real clients, a fake vLLM engine and the real store."""

import asyncio
import base64
import hashlib
import json
import math
import random
import time
from collections.abc import Mapping
from typing import Any

import httpx
import openai
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import format_span_id

import agl
from agl import semconv
from agl.cli.inspection import Inspection
from agl.gateway.dialect.dialect import EventSplitter
from agl.gateway.engine_kind import ENGINE_KINDS
from agl.gateway.request import Caller, Seeds, prepare
from agl.server_thread import ServerThread
from agl.store import Rollout
from agl.tokens.capture import Capture, Json, RequestedFields, strip
from tests.core.fake_engine import WORDS
from tests.gateway.serving import (
    IDS,
    Setup,
    Store,
    assert_tokens,
    chat_body,
    gateway,
    ids,
    logprobs,
    output,
    parsed,
    wait_until,
)
from tests.stepped_clock import step_back

# --- What is recorded ------------------------------------------------------------------------------------------------


def test_media_of_a_request_are_recorded_once_for_each_rollout(setup: Setup) -> None:
    data = random.Random(2).randbytes(20_000)
    digest = hashlib.sha256(data).hexdigest()
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    path = "/rollout/m/attempt/m-a1/v1/chat/completions"
    for _ in range(2):
        setup.store.refusing = not setup.store.refusing  # The call that is refused stores no bytes either.
        for _ in range(2):
            setup.post(chat_body() | {"messages": [{"role": "user", "content": content}]}, path)

    for span in (found := [span for span in setup.store.query_spans("m") if span.name == semconv.SPAN_GATEWAY_CALL]):
        (message,) = json.loads(span.text(semconv.GATEWAY_REQUEST) or "")["messages"]
        assert message["content"][0]["image_url"]["url"] == f"media:image/png;bytes=20000;sha256={digest}"
    assert len(found) == 2
    (media,) = [span for span in setup.store.query_spans("m") if span.name == semconv.SPAN_MEDIA]
    assert media.attributes == {semconv.ROLLOUT_ID: "m", semconv.MEDIA + digest: data}


def test_a_chat_call_is_recorded_with_exact_tokens(setup: Setup) -> None:
    before = time.time_ns()
    answer = setup.client().chat.completions.create(
        model="writer@3", messages=[{"role": "user", "content": "hi"}], temperature=0.5, max_completion_tokens=9
    )
    assert answer.choices[0].message.content == "".join(WORDS)
    span = setup.span()
    assert (span.name, span.kind, span.status, span.parent_id) == ("agl.gateway.call", 3, "ok", None)
    assert before <= span.start_ns <= span.end_ns <= time.time_ns()
    assert_tokens(span)
    assert json.loads(span.text(semconv.GATEWAY_REQUEST) or "")["messages"] == [{"role": "user", "content": "hi"}]
    named = {name: value for name, value in span.attributes.items() if not isinstance(value, bytes)}
    first_token_ns = named.pop(semconv.GATEWAY_FIRST_TOKEN_NS)
    assert isinstance(first_token_ns, int) and 0 < first_token_ns <= span.end_ns - span.start_ns
    queue_ns = named.pop(semconv.GATEWAY_QUEUE_NS)
    assert isinstance(queue_ns, int) and 0 <= queue_ns < first_token_ns
    del named[semconv.GATEWAY_REQUEST], named[semconv.GATEWAY_UPSTREAM]
    assert named == {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "writer@3",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.response.id": answer.id,
        "gen_ai.response.model": "writer@3",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.output.messages": json.dumps(
            [{"role": "assistant", "parts": [{"type": "text", "content": "Hello there!"}], "finish_reason": "stop"}]
        ),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 3,
        "agl.policy.version": "writer@3",
        "agl.mode": "prod",
        "agl.gateway.choice": 0,
        "agl.gateway.changed": '{"return_token_ids":true,"logprobs":true,"top_k":50}',
        "agl.gateway.constraints": ["top_k"],
        "http.response.status_code": 200,
    }


def test_calls_keep_their_order_when_the_clock_steps_back(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    step_back(monkeypatch)
    for _ in range(2):
        setup.post(chat_body(), "/rollout/stepped/attempt/stepped-a1/v1/chat/completions")
    first, second = setup.store.query_spans("stepped")
    assert first.start_ns < first.end_ns < second.start_ns < second.end_ns


def test_a_streamed_chat_is_recorded_with_exact_tokens(setup: Setup) -> None:
    stream = setup.client().chat.completions.create(
        model="writer@3", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "".join(WORDS)
    span = setup.span()
    assert_tokens(span)
    assert output(span)["parts"] == [{"type": "text", "content": "Hello there!"}]
    assert span.attributes[semconv.GEN_AI_RESPONSE_FINISH_REASONS] == ["stop"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_is_recorded(setup: Setup, stream: bool) -> None:
    answer = setup.post({"model": "base", "prompt": "p", "stream": stream}, "/v1/completions")
    assert answer.status_code == 200
    span = setup.span()
    assert_tokens(span)
    assert span.text(semconv.GEN_AI_OPERATION_NAME) == "text_completion"
    assert span.text(semconv.POLICY_VERSION) == "base@0"
    assert output(span)["parts"] == [{"type": "text", "content": "Hello there!"}]


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_without_ids_as_from_hosted_engines_is_recorded_and_inspection_reports_it(stream: bool) -> None:
    with gateway(extra_body={"return_token_ids": None, "logprobs": None}) as setup:
        answer = setup.post(chat_body(stream=stream), "/rollout/r1/attempt/a1/v1/chat/completions")
        assert answer.status_code == 200
        assert "return_token_ids" not in setup.engine.seen[0]
        span = setup.span()
        assert output(span)["parts"] == [{"type": "text", "content": "Hello there!"}]
        assert semconv.RESPONSE_TOKEN_IDS not in span.attributes
        text = Inspection(setup.store.query_spans("r1")).text()
        assert "dropped: no_ids" in text and "it must know return_token_ids, or be of `kind: sglang`" in text


@pytest.mark.parametrize("stream", [False, True])
def test_each_choice_is_a_span(setup: Setup, stream: bool) -> None:
    setup.post(chat_body(n=2, stream=stream))
    first, second = setup.store.appended
    for number, span in enumerate((first, second)):
        assert span.attributes[semconv.GATEWAY_CHOICE] == number
        assert_tokens(span, number)
        assert span.attributes[semconv.GEN_AI_USAGE_OUTPUT_TOKENS] == 3
    assert first.trace_id == second.trace_id and first.span_id != second.span_id
    assert first.text(semconv.GEN_AI_RESPONSE_ID) == second.text(semconv.GEN_AI_RESPONSE_ID)


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls_are_recorded(setup: Setup, stream: bool) -> None:
    setup.post(chat_body("TOOL", stream=stream))
    span = setup.span()
    assert_tokens(span)
    assert output(span) == {
        "role": "assistant",
        "parts": [{"type": "tool_call", "id": "call_1", "name": "search", "arguments": '{"x": 1}'}],
        "finish_reason": "tool_calls",
    }


def test_the_same_request_twice_is_two_calls_each_kept_once(setup: Setup) -> None:
    before = setup.store.count_spans()
    for _ in range(2):
        setup.post(chat_body(), **{"x-request-id": "same"})
    assert setup.store.count_spans() == before + 2
    assert len({span.span_id for span in setup.store.appended}) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_the_call_is_stored_before_the_client_sees_the_end(setup: Setup, stream: bool) -> None:
    setup.store.delay_s = 0.2
    with httpx.stream("POST", f"{setup.url}/v1/chat/completions", json=chat_body(stream=stream)) as answer:
        seen = b""
        for piece in answer.iter_raw():
            if b"[DONE]" in (seen := seen + piece) or not stream:
                assert len(setup.store.appended) == 1
    assert b"there" in seen


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_cannot_be_recorded_is_an_error(setup: Setup, stream: bool) -> None:
    setup.store.refusing = True
    with pytest.raises(openai.APIError, match=r"could not be recorded.*the disk is full") as caught:
        answer: Any = setup.client().chat.completions.create(**chat_body(stream=stream))
        list(answer)
    assert caught.value.code == "not_recorded"
    assert stream or isinstance(caught.value, openai.InternalServerError)


# --- What the client gets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"n": 2},
        {"return_token_ids": True},
        {"logprobs": 1},
        {"logprobs": 1, "return_token_ids": True},
        {"return_token_ids": False},
        {"stream_options": {"include_usage": True}},
        {"content": "TOOL"},
        {"content": "TOOL", "return_token_ids": True},
    ],
)
def test_the_client_gets_the_response_that_the_engine_would_send(
    setup: Setup, path: str, stream: bool, asked: Mapping[str, Any]
) -> None:
    content, more = asked.get("content", "hi"), {name: value for name, value in asked.items() if name != "content"}
    body = {"model": "writer@3", "stream": stream} | more
    body |= {"messages": [{"role": "user", "content": content}]} if "chat" in path else {"prompt": content}
    through = setup.post(body, path)
    engine_url = setup.store.appended[0].text(semconv.GATEWAY_UPSTREAM) or ""
    chosen = {"x-request-id": setup.engine.headers[0]["x-request-id"]}
    direct = httpx.post(engine_url.removesuffix("/v1") + path, json=body, headers=chosen)
    assert through.status_code == direct.status_code == 200
    assert through.headers["content-type"] == direct.headers["content-type"]
    assert parsed(through, stream) == parsed(direct, stream)
    assert through.headers.get("x-engine") == direct.headers.get("x-engine")


def test_models_are_passed_on(setup: Setup) -> None:
    assert [model.id for model in setup.client().models.list()] == ["writer@3", "base"]
    assert [model.id for model in setup.client("/rollout/r/attempt/a/v1").models.list()] == ["writer@3", "base"]
    assert setup.client().models.retrieve("writer@3").id == "writer@3"
    with pytest.raises(openai.NotFoundError, match="no engine lists the model 'org/none'"):
        setup.client().models.retrieve("org/none")
    assert setup.store.appended == []


# --- What the engine gets --------------------------------------------------------------------------------------------


def test_the_engine_gets_the_request_with_the_fields_for_the_capture(setup: Setup) -> None:
    setup.post(chat_body(top_p=0.5), **{"x-agent": "abc", "authorization": "Bearer key"})
    added = {"return_token_ids": True, "logprobs": True, "top_k": 50, "max_tokens": 77}
    assert setup.engine.seen == [chat_body(top_p=0.5) | added]
    headers = setup.engine.headers[0]
    assert (headers["x-agent"], headers["authorization"]) == ("abc", "Bearer key")
    assert "key" not in json.dumps({name: str(value) for name, value in setup.span().attributes.items()})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("header", ["X-Request-Id", "x-client-request-id", "X-Correlation-ID", "x-litellm-call-id"])
def test_a_client_cannot_choose_the_id_of_its_response(setup: Setup, header: str, stream: bool) -> None:
    for _ in range(2):
        setup.post(chat_body(stream=stream, request_id="mine", rid="mine"), **{header: "mine"})
    for headers, sent in zip(setup.engine.headers, setup.engine.seen, strict=True):
        assert "mine" not in f"{headers} {sent}"
    ids = {span.text(semconv.GEN_AI_RESPONSE_ID) for span in setup.store.appended}
    assert len(ids) == 2 and not [each for each in ids if "mine" in str(each)]


def test_fields_that_the_client_set_stay(setup: Setup) -> None:
    setup.post(chat_body(top_k=3, max_completion_tokens=5, logprobs=False))
    (sent,) = setup.engine.seen
    assert (sent["top_k"], sent["max_completion_tokens"], sent["logprobs"]) == (3, 5, True)
    assert "max_tokens" not in sent


def prepared(body: Json, operation: str, **options: Any) -> Json:
    capture = ENGINE_KINDS["vllm"].capture_fields[operation]
    requested = RequestedFields.read(body, operation)
    return prepare(body, requested, capture=capture, **{"extra_body": {}, "forced": {}, "seed": None} | options)


def test_fields_can_be_forced_removed_or_kept() -> None:
    body = {"max_completion_tokens": 5, "temperature": 0.2, "seed": 1}
    sent = prepared(body, "chat", extra_body={"logprobs": None, "seed": 3}, forced={"max_tokens": 9}, seed=2)
    assert sent == {"temperature": 0.2, "seed": 1, "return_token_ids": True, "max_tokens": 9}
    assert body == {"max_completion_tokens": 5, "temperature": 0.2, "seed": 1}
    assert prepared({"logprobs": 0}, "text_completion")["logprobs"] == 0
    assert prepared({}, "text_completion")["logprobs"] == 1
    assert RequestedFields.read({"logprobs": 0}, "text_completion").logprobs
    assert not RequestedFields.read({"logprobs": False}, "chat").logprobs


# --- Whose call it is ------------------------------------------------------------------------------------------------


def test_headers_join_the_call_with_its_parent_span_and_rollout(setup: Setup, spans: InMemorySpanExporter) -> None:
    with agl.rollout("r1", group_id="g1", attempt_id="r1-a2", mode="eval"), agl.role("planner"):
        headers = agl.headers()
    setup.post(chat_body(temperature=0.9), **headers)
    span = setup.span()
    _, trace_id, parent_id, _ = headers["traceparent"].split("-")
    (rollout_span,) = spans.get_finished_spans()
    assert rollout_span.context is not None and parent_id == format_span_id(rollout_span.context.span_id)
    assert (span.trace_id, span.parent_id) == (trace_id, parent_id)
    assert {name: span.text(name) for name in span.attributes if name in CALLER} == {
        "agl.rollout.id": "r1",
        "agl.attempt.id": "r1-a2",
        "agl.group.id": "g1",
        "agl.mode": "eval",
        "agl.role": "planner",
    }
    assert setup.engine.seen[0]["temperature"] == 0.0
    assert "seed" not in setup.engine.seen[0]


CALLER = (semconv.ROLLOUT_ID, semconv.ATTEMPT_ID, semconv.GROUP_ID, semconv.MODE, semconv.ROLE)


def test_the_url_has_the_rollout_and_the_store_its_mode_and_group(setup: Setup) -> None:
    setup.store.enqueue_rollouts([Rollout("r 2", "task", group_id="g2", mode="train")])
    setup.client("/rollout/r%202/attempt/a1/v1").chat.completions.create(**chat_body(temperature=0.1))
    span = setup.span()
    assert [span.text(name) for name in CALLER] == ["r 2", "a1", "g2", "train", None]
    assert span.rollout_id == "r 2" and span.parent_id is None
    assert setup.store.query_spans("r 2") == [span]
    assert setup.engine.seen[0]["temperature"] == 1.0


@pytest.mark.parametrize(
    ("encoded", "rollout"),
    [("org%2Ftask-1", "org/task-1"), ("a+b", "a+b"), ("a%252Fb", "a%2Fb"), ("%C3%A9", "é"), ("x%3Fy%23z", "x?y#z")],
)
def test_ids_in_the_url_are_opaque_and_percent_encoded(setup: Setup, encoded: str, rollout: str) -> None:
    for path in ("chat/completions", "models", "embeddings"):
        method = "GET" if path == "models" else "POST"
        url = f"{setup.url}/rollout/{encoded}/attempt/{encoded}-a1/v1/{path}"
        assert httpx.request(method, url, json=chat_body(input="x")).status_code == 200
    assert (setup.span().rollout_id, setup.span().attempt_id) == (rollout, f"{rollout}-a1")
    assert httpx.post(f"{setup.url}/rollout/{encoded}/attempt//v1/chat/completions").status_code == 404


@pytest.mark.parametrize(
    ("headers", "rollout"),
    [
        (["agl.rollout.id=task+1"], "task+1"),
        (["agl.rollout.id=task%201"], "task 1"),
        (["agl.rollout.id = ows , a=b"], "ows"),
        (["a=b", "agl.rollout.id=second"], "second"),
        (["agl.rollout.id=x;ttl=1,a=b;c"], "x"),
    ],
)
def test_baggage_is_read_as_w3c_defines_it(setup: Setup, headers: list[str], rollout: str) -> None:
    sent = [("baggage", header) for header in headers]
    assert httpx.post(f"{setup.url}/v1/chat/completions", json=chat_body(), headers=sent).status_code == 200
    assert setup.span().rollout_id == rollout


@pytest.mark.parametrize("rollout", ["task 1", "task+1", "a,b;c=d", "é/%"])
def test_ids_in_our_own_headers_arrive_unchanged(setup: Setup, rollout: str) -> None:
    with agl.rollout(rollout):
        headers = agl.headers()
    setup.post(chat_body(), **headers)
    assert setup.span().rollout_id == rollout
    with agl.joined(headers) as joined:
        assert joined is not None and joined.rollout_id == rollout


def test_a_rollout_that_was_not_queued_has_mode_prod(setup: Setup) -> None:
    setup.post(chat_body(temperature=0.1), "/rollout/stray/attempt/a1/v1/chat/completions")
    assert [setup.span().text(name) for name in CALLER] == ["stray", "a1", None, "prod", None]
    assert setup.engine.seen[0]["temperature"] == 0.1


def test_the_url_overrides_the_baggage(setup: Setup) -> None:
    path = "/rollout/from-url/attempt/a1/v1/chat/completions"
    setup.post(chat_body(), path, baggage="agl.rollout.id=from-baggage,agl.mode=eval,other=x")
    assert [setup.span().text(name) for name in CALLER] == ["from-url", "a1", None, "eval", None]


@pytest.mark.parametrize("traceparent", ["", "junk", "00-" + "0" * 32 + "-" + "1" * 16 + "-01"])
def test_a_call_without_a_valid_traceparent_starts_a_trace(setup: Setup, traceparent: str) -> None:
    setup.post(chat_body(), traceparent=traceparent)
    span = setup.span()
    assert span.parent_id is None and len(span.trace_id) == 32 and int(span.trace_id, 16) > 0


def test_a_call_with_several_parents_has_none(setup: Setup) -> None:
    headers = [("traceparent", f"00-{digit * 32}-{digit * 16}-01") for digit in "12"]
    httpx.post(f"{setup.url}/v1/chat/completions", json=chat_body(), headers=headers)
    assert setup.span().parent_id is None
    setup.store.appended.clear()
    httpx.post(f"{setup.url}/v1/chat/completions", json=chat_body(), headers=headers[:1] * 2)
    assert setup.span().parent_id == "1" * 16


def test_training_calls_get_seeds_that_repeat_with_the_attempt(setup: Setup) -> None:
    def call(rollout: str, **more: Any) -> int:
        setup.post(chat_body(**more), baggage=f"agl.rollout.id={rollout},agl.attempt.id=a1,agl.mode=train")
        return setup.engine.seen[-1]["seed"]

    seeds = [call("s1"), call("s1"), call("s2")]
    assert len(set(seeds)) == 3
    assert call("s1", seed=7) == 7
    again, callers = Seeds(), [Caller(rollout, "a1", mode="train") for rollout in ("s1", "s1", "s2")]
    assert [again.next(caller) for caller in callers] == seeds
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert setup.store.appended[0].attributes[semconv.GEN_AI_REQUEST_SEED] == seeds[0]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_seed_of_a_rollout_decides_and_its_id_does_not(setup: Setup, mode: str) -> None:
    ids = [f"{mode}-one", f"{mode}-two", f"{mode}-two~1", f"{mode}-other"]
    for rollout_id, seed in zip(ids, (5, 5, 5, 6), strict=True):
        setup.store.enqueue_rollouts([Rollout(rollout_id, None, mode=mode, metadata={"seed": seed})])

    def call(rollout: str, attempt: str = "a1") -> int:
        baggage = f"agl.rollout.id={rollout},agl.attempt.id={rollout}-{attempt},agl.mode={mode}"
        setup.post(chat_body(), baggage=baggage)
        return setup.engine.seen[-1]["seed"]

    first, second, repeated, other = ([call(rollout) for _ in range(2)] for rollout in ids)
    assert first == second == repeated and len({*first, *other, call(ids[0], "a2")}) == 5
    setup.post(chat_body(), f"/rollout/{ids[0]}/attempt/{ids[0]}-a3/v1/chat/completions")
    setup.post(chat_body(), f"/rollout/{ids[1]}/attempt/{ids[1]}-a3/v1/chat/completions")
    assert setup.engine.seen[-1]["seed"] == setup.engine.seen[-2]["seed"]


def test_without_a_seed_only_training_calls_get_one(setup: Setup) -> None:
    setup.store.enqueue_rollouts([Rollout("unseeded", None, mode="eval")])
    for rollout, mode in (("unseeded", "eval"), ("unknown", "eval"), ("unknown", "prod")):
        setup.post(chat_body(), baggage=f"agl.rollout.id={rollout},agl.mode={mode}")
        assert "seed" not in setup.engine.seen[-1]


# --- What goes wrong -------------------------------------------------------------------------------------------------


def test_an_unknown_model_gets_the_engines_own_error(setup: Setup) -> None:
    with pytest.raises(openai.NotFoundError, match="The model `nobody` does not exist") as caught:
        setup.client().chat.completions.create(**chat_body(model="nobody"))
    assert caught.value.type == "NotFoundError"
    span = setup.span()
    assert (span.status, span.status_message) == ("error", "The model `nobody` does not exist.")
    assert span.text(semconv.ERROR_TYPE) == "404"
    assert span.attributes[semconv.HTTP_RESPONSE_STATUS_CODE] == 404


@pytest.mark.parametrize("body", [b"{", b"", b"[1]", b"\xff", b"[" * 100_000, '{"a":1}'.encode("utf-16")])
def test_malformed_json_is_a_400(setup: Setup, body: bytes) -> None:
    answer = httpx.post(f"{setup.url}/v1/chat/completions", content=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_json")
    assert "request body is" in error["message"]
    assert setup.engine.seen == setup.store.appended == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/rollout/r/attempt/a/v1/completions/", 404),
    ],
)
def test_unknown_paths_and_methods_get_an_openai_error(setup: Setup, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, setup.url + path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"] == f"the gateway does not serve {method} {path[path.index('/v1') :]}"


def test_values_of_wrong_types_reach_the_engine_and_the_call_is_recorded(setup: Setup) -> None:
    answer = setup.post(chat_body(temperature="hot", max_tokens=[1], seed={}))
    assert answer.status_code == 200
    assert setup.engine.seen[0]["temperature"] == "hot"
    assert semconv.GEN_AI_REQUEST_TEMPERATURE not in setup.span().attributes


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/rollout/r/attempt/a/v1/completions"])
def test_no_engine_is_a_503(path: str) -> None:
    store = Store()
    with ServerThread(store, port=0, otlp_http_port=0, upstream=None) as server:
        answer = httpx.post(server.base_url + path, json=chat_body())
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "no_engine"
        assert httpx.get(f"{server.base_url}/v1/models").status_code == 503
    store.close()


def test_an_engine_that_is_down_is_a_503_and_recorded() -> None:
    store = Store()
    with ServerThread(store, port=0, otlp_http_port=0, upstream="http://127.0.0.1:9/v1") as server:
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
        with pytest.raises(
            openai.InternalServerError, match=r"no engine answers at http://127\.0\.0\.1:9/v1"
        ) as caught:
            client.chat.completions.create(**chat_body())
    assert (caught.value.status_code, caught.value.code) == (503, "engine_unreachable")
    (span,) = store.appended
    assert (span.status, span.text(semconv.ERROR_TYPE)) == ("error", "engine_unreachable")
    assert span.attributes[semconv.HTTP_RESPONSE_STATUS_CODE] == 503
    store.close()


def test_a_silent_engine_is_a_504() -> None:
    with gateway(timeouts={"first_byte_s": 0.1}) as setup:
        answer = setup.post(chat_body("SLOW"))
        assert answer.status_code == 504
        assert "(gateway.timeouts.first_byte_s: 0.1)" in answer.json()["error"]["message"]
        assert setup.span().text(semconv.ERROR_TYPE) == "engine_timeout"


def test_an_answer_that_is_not_json_is_a_502(setup: Setup) -> None:
    answer = setup.post(chat_body("GARBAGE"))
    assert answer.status_code == 502
    assert "is not an OpenAI response" in answer.json()["error"]["message"]
    assert setup.span().status == "error"


def test_an_engine_that_breaks_off_ends_the_stream_with_an_error(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(openai.APIError, match="broke off"):
        list(setup.client().chat.completions.create(**chat_body("BREAK", stream=True)))
    span = setup.span()
    assert (span.status, span.text(semconv.ERROR_TYPE)) == ("error", "engine_error")
    assert ids(span, semconv.RESPONSE_TOKEN_IDS) == IDS[:1]


def test_a_client_that_leaves_a_stream_cancels_it_and_the_tokens_so_far_are_recorded(setup: Setup) -> None:
    stream = setup.client().chat.completions.create(**chat_body("SLOW", stream=True))
    for chunk in stream:
        if chunk.choices[0].delta.content == " there":
            break
    stream.close()
    span = setup.wait_for_span()
    assert (span.status, span.text(semconv.ERROR_TYPE)) == ("error", "cancelled")
    sampled = ids(span, semconv.RESPONSE_TOKEN_IDS)
    assert sampled[:2] == IDS[:2] and len(sampled) < 100
    assert len(logprobs(span)) == len(sampled)
    wait_until(lambda: setup.engine.streams_cut == 1)


def test_a_client_that_leaves_before_the_answer_cancels_the_call(setup: Setup) -> None:
    with pytest.raises(openai.APITimeoutError):
        setup.client(timeout=0.2).chat.completions.create(**chat_body("SLOW"))
    span = setup.wait_for_span()
    assert span.text(semconv.ERROR_TYPE) == "cancelled"
    assert semconv.RESPONSE_TOKEN_IDS not in span.attributes
    wait_until(lambda: setup.engine.streams_cut == 1)


async def test_many_streams_at_once_keep_their_tokens_apart(setup: Setup) -> None:
    client = openai.AsyncOpenAI(base_url=f"{setup.url}/v1", api_key="none", max_retries=0)

    async def call(number: int) -> str:
        stream = await client.chat.completions.create(**chat_body(f"question {number}", stream=True))
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert await asyncio.gather(*map(call, range(50))) == ["".join(WORDS)] * 50
    await client.close()
    seen = zip(setup.engine.headers, setup.engine.seen, strict=True)
    asked = {f"chatcmpl-{headers['x-request-id']}": body["messages"][0]["content"] for headers, body in seen}
    assert len(setup.store.appended) == len(asked) == 50
    for span in setup.store.appended:
        assert_tokens(span)
        question = asked[span.text(semconv.GEN_AI_RESPONSE_ID) or ""]
        assert f'"{question}"' in (span.text(semconv.GATEWAY_REQUEST) or "")


# --- The wire, as pure functions -------------------------------------------------------------------------------------


def test_events_are_split_wherever_the_network_splits_the_bytes() -> None:
    stream = b": ping\r\n\r\ndata: 1\n\ndata: 2\r\n\r\nda"
    for size in range(1, len(stream) + 1):
        splitter = EventSplitter()
        events = [event for at in range(0, len(stream), size) for event in splitter.split(stream[at : at + size])]
        assert (events, splitter.rest) == ([b": ping", b"data: 1", b"data: 2"], b"da")


def test_a_long_event_is_split_in_time_linear_in_its_length() -> None:
    splitter, events, piece = EventSplitter(), list[bytes](), b"data: " + b"1, " * 1000
    before = time.perf_counter()
    for _ in range(10_000):
        events += splitter.split(piece)
    events += splitter.split(b"\n\n")
    assert [len(event) for event in events] == [len(piece) * 10_000]
    assert time.perf_counter() - before < 10  # Searching from the start each time takes minutes.


def test_tool_calls_are_joined_from_chunks() -> None:
    capture = Capture()
    for function in ({"name": "search", "arguments": ""}, {"arguments": '{"x"'}, {"arguments": ": 1}"}):
        calls = [{"index": 0, "id": "c1" if "name" in function else None, "function": function}]
        capture.add({"choices": [{"index": 0, "delta": {"tool_calls": calls}}]})
    capture.add({"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 1, "id": "c2"}]}}]})
    first, second = capture.choices()[0].tool_calls
    assert (first.id, first.name, first.arguments) == ("c1", "search", '{"x": 1}')
    assert second.id == "c2"


def test_logprobs_of_an_engine_may_be_infinite() -> None:
    capture = Capture()
    capture.add({"choices": [{"logprobs": {"token_logprobs": [-math.inf, -1.0]}, "text": "x"}]})
    assert capture.choices()[0].logprobs == [-math.inf, -1.0]


@pytest.mark.parametrize(
    ("asked", "answered", "seen"),
    [
        ("writer", "writer@3", "writer"),
        ("writer@3", "writer@3", "writer@3"),
        ("writer", "writers@3", "writers@3"),
        (None, "base@0", "base@0"),
    ],
)
def test_the_client_sees_the_model_name_it_asked_for(asked: str | None, answered: str, seen: str) -> None:
    answer = {"model": answered, "choices": []}
    changed = strip(answer, RequestedFields(token_ids=False, logprobs=False, model=asked))
    assert (answer["model"], changed) == (seen, answered != seen)
