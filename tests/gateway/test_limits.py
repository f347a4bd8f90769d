"""Pause, slots of an engine, timeouts, and calls that are not recorded."""

import asyncio
import gzip
import json
import socket
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
import zstandard

from agl import semconv
from agl.gateway.request import Caller, Seeds
from tests.core.fake_engine import WORDS, FakeEngine
from tests.gateway.scripted_engine import answering, choice, envelope, streamed
from tests.gateway.serving import Setup, assert_tokens, chat_body, gateway, serving, wait_until


def control(setup: Setup, verb: str, **body: Any) -> Any:
    answer = httpx.post(f"{setup.url}/api/gateway/{verb}", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_paused_gateway_answers_429_until_it_resumes() -> None:
    with gateway() as setup:
        assert control(setup, "pause") == {"paused": True, "calls": 0, "models": {}, "versions": {}, "production": {}}
        answer = setup.post(chat_body())
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["code"] == "paused"
        assert setup.store.appended == setup.engine.seen == []
        with ThreadPoolExecutor() as pool:
            client = openai.OpenAI(base_url=f"{setup.url}/v1", api_key="none", max_retries=5)
            call = pool.submit(lambda: client.chat.completions.create(**chat_body()))
            assert control(setup, "resume")["paused"] is False
            assert call.result(30).choices[0].message.content == "".join(WORDS)


def test_a_pause_waits_for_active_calls() -> None:
    with gateway() as setup, ThreadPoolExecutor() as pool:
        call = pool.submit(setup.post, chat_body("HOLD"))
        wait_until(lambda: bool(setup.engine.seen))
        assert control(setup, "pause", drain_s=0.05)["calls"] == 1
        pause = pool.submit(control, setup, "pause")
        setup.engine.released.set()
        assert pause.result(30)["calls"] == 0
        assert call.result().status_code == 200


def test_an_invalid_pause_is_refused() -> None:
    with gateway() as setup:
        answer = httpx.post(f"{setup.url}/api/gateway/pause", json={"drain_s": -1})
        assert answer.status_code == 422
        assert "/api/gateway/pause: drain_s:" in answer.json()["error"]["message"]


@contextmanager
def narrow(**settings: Any) -> Iterator[Setup]:
    """A gateway with an engine that has one slot."""
    engine = FakeEngine()
    with serving(engine) as url, gateway(engines=[{"url": url, "max_concurrent": 1}], **settings) as setup:
        setup.engine = engine
        yield setup


def test_calls_wait_for_a_slot_and_their_spans_have_the_time() -> None:
    with narrow() as setup, ThreadPoolExecutor() as pool:
        first = pool.submit(setup.post, chat_body("HOLD"))
        wait_until(lambda: len(setup.engine.seen) == 1)
        second = pool.submit(setup.post, chat_body())
        wait_until(lambda: httpx.get(f"{setup.url}/api/health").json()["engines"][0]["waiting"] == 1)
        assert len(setup.engine.seen) == 1
        setup.engine.released.set()
        assert first.result().status_code == second.result().status_code == 200
        waited = max(int(str(span.attributes[semconv.GATEWAY_QUEUE_NS])) for span in setup.store.appended)
        assert waited > 1_000_000


def test_a_call_that_gets_no_slot_in_time_may_be_repeated() -> None:
    with narrow(timeouts={"queue_s": 0.05}) as setup, ThreadPoolExecutor() as pool:
        first = pool.submit(setup.post, chat_body("HOLD"))
        wait_until(lambda: len(setup.engine.seen) == 1)
        answer = setup.post(chat_body())
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")
        assert answer.json()["error"]["code"] == "engine_busy"
        assert "1 calls are active (max_concurrent)" in answer.json()["error"]["message"]
        setup.engine.released.set()
        assert first.result().status_code == 200


@pytest.mark.parametrize(("hop", "limit"), [("chunk_s", 0.01), ("total_s", 0.3)])
def test_a_stream_that_is_too_slow_ends_with_an_error(hop: str, limit: float) -> None:
    with gateway(timeouts={hop: limit}) as setup:
        last = setup.post(chat_body("SLOW", stream=True)).text.strip().split("\n\n")[-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "engine_timeout"
        assert f"(gateway.timeouts.{hop}: {limit:g})" in error["message"]
        assert setup.span().text(semconv.ERROR_TYPE) == "engine_timeout"


@pytest.mark.parametrize("stream", [False, True])
def test_record_open_passes_an_unrecorded_response_and_marks_it(stream: bool) -> None:
    with gateway(record="open") as setup:
        setup.store.refusing = True
        answer = setup.post(chat_body(stream=stream))
        assert answer.status_code == 200
        if stream:
            assert answer.text.endswith(": the call could not be recorded\n\ndata: [DONE]\n\n")
        else:
            assert answer.headers["x-agl-recorded"] == "false"
            assert answer.json()["choices"][0]["message"]["content"] == "".join(WORDS)
        chunks = setup.client().chat.completions.create(**chat_body(stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "".join(WORDS)
        setup.store.refusing = False
        assert "x-agl-recorded" not in setup.post(chat_body()).headers
        assert_tokens(setup.span())


async def test_a_call_that_cannot_be_stored_does_not_fail_its_batch(setup: Setup) -> None:
    setup.store.delay_s = 0.1  # They wait for the first, and are committed together.
    setup.store.refused_rollout = "r3"
    async with httpx.AsyncClient() as client:
        urls = [f"{setup.url}/rollout/r{number}/attempt/a/v1/chat/completions" for number in range(6)]
        answers = await asyncio.gather(*(client.post(url, json=chat_body()) for url in urls))
    assert [answer.status_code for answer in answers] == [200, 200, 200, 500, 200, 200]
    assert answers[3].json()["error"]["code"] == "not_recorded"
    assert len(setup.store.appended) == 5


@pytest.mark.parametrize(
    ("more", "baggage", "message"),
    [
        ({"max_tokens": 2**63}, "", "gen_ai.request.max_tokens is 9223372036854775808, and a span holds 64 bits"),
        ({"seed": -(2**64)}, "", "gen_ai.request.seed is -18446744073709551616"),
        ({}, "agl.rollout.id=" + "r" * 501, "agl.rollout.id has 501 characters, expected at most 500"),
        ({}, "agl.rollout.id=r,agl.attempt.id=" + "a" * 501, "agl.attempt.id has 501 characters"),
    ],
)
@pytest.mark.parametrize("path", ["chat/completions", "messages"])
def test_a_request_that_could_not_be_recorded_is_refused_before_it_is_sampled(
    setup: Setup, more: dict[str, Any], baggage: str, message: str, path: str
) -> None:
    content = json.dumps(chat_body(max_tokens=9) | more).encode()
    answer = httpx.post(f"{setup.url}/v1/{path}", content=content, headers={"baggage": baggage})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_recordable")
    assert message in answer.json()["error"]["message"]
    assert setup.engine.seen == []


@pytest.mark.parametrize(
    ("field", "code", "message"),
    [
        ('"model": 5', "invalid_model", "model is int, expected a string"),
        (r'"model": "\ud800"', "invalid_json", "surrogates not allowed"),
        (r'"model": "base", "stop": ["a", {"b\udfff": 1}]', "invalid_json", "surrogates not allowed"),
        ('"model": "base", "temperature": NaN', "invalid_json", "NaN is no number in JSON"),
    ],
)
def test_what_no_engine_can_read_is_refused_and_does_not_change_the_next_seed(
    setup: Setup, field: str, code: str, message: str
) -> None:
    url = f"{setup.url}/rollout/{code}{len(field)}/attempt/{{}}/v1/chat/completions"
    train, good = {"baggage": "agl.mode=train"}, '"model": "base"'
    for number in range(3):
        content = f'{{{field if number == 1 else good}, "messages": [{{"role": "user", "content": "hi"}}]}}'
        answer = httpx.post(url.format("a"), content=content, headers=train)
        assert answer.status_code == (400 if number == 1 else 200)
        if number == 1:
            assert answer.json()["error"]["code"] == code and message in answer.json()["error"]["message"]
    assert httpx.post(url.format("a" * 501), json=chat_body(), headers=train).status_code == 400
    assert len(setup.engine.seen) == 2
    caller = Caller(f"{code}{len(field)}", "a", mode="train")
    seeds = Seeds()
    assert [sent["seed"] for sent in setup.engine.seen] == [seeds.next(caller), seeds.next(caller)]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "zstd"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/embeddings"])
def test_an_encoded_request_is_decoded(setup: Setup, encoding: str, path: str) -> None:
    encode = {"gzip": gzip.compress, "deflate": zlib.compress, "zstd": zstandard.compress}[encoding]
    body = json.dumps(chat_body(max_tokens=9, input="x")).encode()
    answer = httpx.post(setup.url + path, content=encode(body), headers={"content-encoding": encoding})
    assert answer.status_code == 200 and setup.engine.seen[0]["model"] == "writer@3"
    assert "content-encoding" not in setup.engine.headers[0]


@pytest.mark.parametrize(
    ("encoding", "status", "message"),
    [("br", 415, "the content encoding 'br', expected one of identity, gzip"), ("gzip", 400, "not valid gzip")],
)
def test_an_encoding_that_is_unknown_or_wrong_is_refused(
    setup: Setup, encoding: str, status: int, message: str
) -> None:
    answer = setup.post(chat_body(), **{"content-encoding": encoding})
    assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_a_byte_order_mark_is_skipped(setup: Setup) -> None:
    body = b"\xef\xbb\xbf" + json.dumps(chat_body()).encode()
    assert httpx.post(f"{setup.url}/v1/chat/completions", content=body).status_code == 200


def test_a_client_that_reads_nothing_gives_its_place_back(setup: Setup) -> None:
    """At once if the engine has ended, else after `send_s`; then a pause drains."""
    for chunks, drain_s in (1, 5), (4000, 10):
        script = answering({"finish_reason": "stop"})
        script.chunks = [envelope([streamed(choice()) | {"finish_reason": None, "junk": "x" * 50_000}])] * chunks
        with (
            serving(script) as url,
            gateway(engines=[{"url": url, "max_concurrent": 1}], timeouts={"send_s": 1}) as narrow,
            socket.socket() as client,
        ):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", int(narrow.url.rpartition(":")[2])))
            body = json.dumps(chat_body(stream=True, model="base", junk="")).encode()
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
            client.sendall(head + body)
            wait_until(lambda: bool(script.seen))  # noqa: B023 - called at once
            assert control(narrow, "pause", drain_s=drain_s)["calls"] == 0


def test_embeddings_are_passed_on_and_not_recorded(setup: Setup) -> None:
    embedding = setup.client().embeddings.create(model="base", input=["a", "b"], encoding_format="float")
    assert [one.embedding for one in embedding.data] == [[0.5, 1.0]] * 2
    assert setup.store.appended == []
    assert setup.engine.seen == [{"model": "base", "input": ["a", "b"], "encoding_format": "float"}]
