"""Starts a gateway with a fake vLLM engine and a real store, and reads what was recorded."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from agl import otlp, semconv
from agl.config import GatewayConfig
from agl.errors import StoreError
from agl.gateway.dialect.dialect import EventSplitter, event_data
from agl.gateway.dialect.translated import Translated
from agl.server.app_thread import AppThread
from agl.server_thread import ServerThread
from agl.span import Span
from agl.store.span_row import SpanRow
from agl.store.sqlite.store import SqliteStore
from agl.tokens.packing import unpack_ids, unpack_logprobs
from tests.core.fake_engine import PROMPT_IDS, FakeEngine, logprob, token_id

IDS = [token_id(0, position) for position in range(3)]
LOGPROBS = [logprob(0, position) for position in range(3)]


class Store(SqliteStore):
    """The real store in memory, which can be slow or refuse; `appended` has the appended spans."""

    def __init__(self) -> None:
        super().__init__(":memory:", uri="memory://")
        self.delay_s = 0.0
        self.refusing = False
        self.refused_rollout = ""
        self.unreadable = False
        self.appended: list[Span] = []

    def query_rows(self, rollout_id: str) -> list[bytes]:
        if self.unreadable:
            raise StoreError("the disk does not answer")
        return super().query_rows(rollout_id)

    def append_rows(self, rows: Sequence[SpanRow]) -> int:
        time.sleep(self.delay_s)
        if self.refusing:
            raise StoreError("the disk is full")
        if self.refused_rollout in [row.rollout_id for row in rows]:
            raise StoreError(f"no place for {self.refused_rollout}")
        new = super().append_rows(rows)
        self.appended += otlp.decode(b"".join(row.otlp for row in rows))
        return new


@dataclass
class Setup:
    """A gateway and its fake engine, both served."""

    store: Store
    engine: FakeEngine
    url: str

    def client(self, path: str = "/v1", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + path, api_key="none", max_retries=0, **options)

    def post(self, body: Any, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers=headers)

    def span(self) -> Span:
        (span,) = self.store.appended
        return span

    def wait_for_span(self) -> Span:
        wait_until(lambda: bool(self.store.appended))
        return self.span()


def chat_body(content: str = "hi", **more: Any) -> dict[str, Any]:
    return {"model": "writer@3", "messages": [{"role": "user", "content": content}]} | more


def ids(span: Span, name: str) -> list[int]:
    value = span.attributes[name]
    assert isinstance(value, bytes)
    return unpack_ids(value)


def logprobs(span: Span) -> list[float]:
    value = span.attributes[semconv.RESPONSE_LOGPROBS]
    assert isinstance(value, bytes)
    return unpack_logprobs(value)


def assert_tokens(span: Span, choice: int = 0) -> None:
    assert ids(span, semconv.PROMPT_TOKEN_IDS) == PROMPT_IDS
    assert ids(span, semconv.RESPONSE_TOKEN_IDS) == [token_id(choice, position) for position in range(3)]
    assert logprobs(span) == [logprob(choice, position) for position in range(3)]


def output(span: Span) -> Any:
    (message,) = json.loads(span.text(semconv.GEN_AI_OUTPUT_MESSAGES) or "")
    return message


def parsed(answer: httpx.Response, stream: bool) -> Any:
    """The client's JSON: the response, or the chunks of its stream."""
    if not stream:
        return answer.json()
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def stream_through(call: Translated, deltas: list[dict[str, Any]]) -> list[Any]:
    """The events for a streamed answer of `deltas`."""
    events = b""
    for chunk in [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]:
        call.capture.add(chunk)
        events += call.render_chunk(b"", chunk)
    events += call.render_end(b"")
    return [json.loads(event_data(event)) for event in EventSplitter().split(events)]


@contextmanager
def serving(engine: FakeEngine, port: int = 0) -> Iterator[str]:
    server = AppThread()
    url = server.add(engine.app, port=port) + "/v1"
    with server:
        yield url


@contextmanager
def gateway(
    engine: FakeEngine | None = None, overrides: dict[str, dict[str, Any]] | None = None, **settings: Any
) -> Iterator[Setup]:
    """A gateway for `engine`, or for the engines in `settings`, which configure it."""
    store = Store()
    engine = engine or (None if "engines" in settings else FakeEngine())
    config = GatewayConfig(**settings)
    try:
        upstream = engine and engine.app
        with ServerThread(
            store, port=0, otlp_http_port=0, upstream=upstream, gateway=config, overrides=overrides
        ) as server:
            yield Setup(store, engine or FakeEngine(), server.base_url)
    finally:
        store.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()
