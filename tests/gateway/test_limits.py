"""Pause, slots of an engine, timeouts, and calls that are not recorded."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from agl import semconv
from tests.core.fake_engine import WORDS, FakeEngine
from tests.gateway.serving import Setup, assert_tokens, chat_body, gateway, serving, wait_until


def control(setup: Setup, verb: str, **body: Any) -> Any:
    answer = httpx.post(f"{setup.url}/api/gateway/{verb}", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_paused_gateway_answers_429_until_it_resumes() -> None:
    with gateway() as setup:
        assert control(setup, "pause") == {"paused": True, "calls": 0, "models": {}}
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
    bodies = [chat_body(model="\ud800" if number == 3 else "base") for number in range(6)]
    async with httpx.AsyncClient() as client:
        url = f"{setup.url}/v1/chat/completions"
        answers = await asyncio.gather(*(client.post(url, content=json.dumps(body)) for body in bodies))
    assert [answer.status_code for answer in answers] == [200, 200, 200, 500, 200, 200]
    assert answers[3].json()["error"]["code"] == "not_recorded"
    assert len(setup.store.appended) == 5


def test_embeddings_are_passed_on_and_not_recorded(setup: Setup) -> None:
    embedding = setup.client().embeddings.create(model="base", input=["a", "b"], encoding_format="float")
    assert [one.embedding for one in embedding.data] == [[0.5, 1.0]] * 2
    assert setup.store.appended == []
    assert setup.engine.seen == [{"model": "base", "input": ["a", "b"], "encoding_format": "float"}]
