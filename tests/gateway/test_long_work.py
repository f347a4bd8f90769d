"""Requests, events and responses of megabytes: they leave the event loop, and give what short ones give."""

import asyncio
import threading

import pytest

from agl import semconv
from agl.server.receiving import long_work
from tests.core.fake_engine import FakeEngine
from tests.gateway.scripted_engine import ScriptedEngine, choice, envelope, streamed
from tests.gateway.serving import chat_body, gateway, ids

LONG = list(range(200_000))
"""Over a megabyte as JSON."""


def test_only_long_work_leaves_the_event_loop() -> None:
    async def threads() -> list[int]:
        return [await long_work(size, threading.get_ident) for size in (1000, 10**6)]

    short, long = asyncio.run(threads())
    assert short == threading.get_ident() != long


def test_cancelled_work_has_ended_before_its_caller_goes_on() -> None:
    started, released, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        released.wait(20)
        ended.set()

    async def cancel() -> None:
        caller = asyncio.create_task(long_work(10**6, work))
        await asyncio.to_thread(started.wait, 20)
        caller.cancel()
        await asyncio.sleep(0)
        released.set()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert ended.is_set()

    asyncio.run(cancel())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_long_request_and_a_long_response_are_recorded(path: str, stream: bool) -> None:
    whole = envelope([choice()]) | {"prompt_token_ids": LONG}
    engine: FakeEngine = ScriptedEngine(whole=whole, chunks=[whole | {"choices": [streamed(choice())]}])
    text = "x " * 200_000
    with gateway(engine) as setup:
        answer = setup.post(chat_body(text, max_tokens=9, input=text, stream=stream), path)
        assert answer.status_code == 200 and "hi" in answer.text
        span = setup.span()
    assert span.status == "ok"
    assert ids(span, semconv.PROMPT_TOKEN_IDS) == LONG
    assert ids(span, semconv.RESPONSE_TOKEN_IDS) == [10, 11]
    assert text in (span.text(semconv.GATEWAY_REQUEST) or "")
