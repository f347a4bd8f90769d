"""The server thread: ports, health, start and stop."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from agl import otlp
from agl.collector.http import PROTOBUF
from agl.config import GatewayConfig
from agl.errors import AglError
from agl.server.app_thread import AppThread
from agl.server.auth import BearerTokens
from agl.server_thread import IngestRate, ServerThread
from agl.span import Span
from agl.store import open_store
from tests.core.fake_engine import FakeEngine


def test_it_serves_gateway_health_and_receiver_before_an_engine_of_its_own() -> None:
    store, engine = open_store("memory://"), FakeEngine()
    with ServerThread(store, port=0, otlp_http_port=0, upstream=engine.app) as server:
        body = otlp.encode([Span("a" * 32, "b" * 16, None, "chat", 1, 2)])
        answer = httpx.post(f"{server.otlp_url}/v1/traces", content=body, headers={"content-type": PROTOBUF})
        assert answer.status_code == 200
        health = httpx.get(f"{server.base_url}/api/health").json()
        assert health["spans"] == 1
        (engine_state,) = health["engines"]
        assert engine_state.pop("url").startswith("http://127.0.0.1:")
        assert engine_state == {"answers": True, "calls": 0, "waiting": 0}
        assert httpx.get(f"{server.base_url}/v1/models").json()["data"][0]["id"] == "writer@3"
    store.close()


def test_the_port_of_an_engine_of_its_own_has_the_rules_of_the_other_ports() -> None:
    store, engine, config = open_store("memory://"), FakeEngine(), GatewayConfig(max_body_bytes=1000)
    chat = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
    with ServerThread(store, port=0, otlp_http_port=0, upstream=engine.app, gateway=config) as server:
        (state,) = httpx.get(f"{server.base_url}/api/health").json()["engines"]

        def post(**headers: str) -> int:
            return httpx.post(f"{state['url']}/chat/completions", json=chat, headers=headers).status_code

        assert (post(), post(host="evil.example"), post(origin="http://evil.example")) == (200, 421, 403)
        assert httpx.post(f"{state['url']}/chat/completions", content=bytes(4001)).status_code == 413
    tokens, headers = BearerTokens(["secret"]), {"authorization": "Bearer secret"}
    with ServerThread(store, port=0, otlp_http_port=0, upstream=engine.app, tokens=tokens) as server:
        (state,) = httpx.get(f"{server.base_url}/api/health").json()["engines"]
        assert state["answers"] and "@" not in state["url"]
        assert post() == post(**headers) == 401, "only the gateway has the password"
        assert httpx.post(f"{server.base_url}/v1/chat/completions", json=chat, headers=headers).status_code == 200
        assert "authorization" not in engine.headers[-1]
    store.close()


def test_the_ingest_rate_is_that_of_the_last_minute() -> None:
    rate = IngestRate()
    seen = [(0, 100), (0.5, 400), (10, 300), (60, 700), (90, 1000), (100, 0)]
    assert [rate.of(spans, now_s) for now_s, spans in seen] == [None, None, 20.0, 10.0, 10.0, 0.0]


def test_health_says_that_no_engine_answers() -> None:
    upstream = "http://127.0.0.1:9/v1"
    store = open_store("memory://")
    with ServerThread(store, port=0, otlp_http_port=0, upstream=upstream) as server:
        assert httpx.get(f"{server.base_url}/api/health").json() == {
            "spans": 0,
            "spans_per_s": None,
            "engines": [{"url": upstream, "answers": False, "calls": 0, "waiting": 0}],
        }
    store.close()


@pytest.mark.parametrize(
    ("busy", "name"),
    [("port", "the gateway cannot listen"), ("otlp_http_port", "the OTLP/HTTP receiver cannot listen")],
)
def test_a_port_in_use_is_named_and_the_other_ports_are_released(busy: str, name: str) -> None:
    store = open_store("memory://")
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as other:
        ports = {"port": other.getsockname()[1], "otlp_http_port": other.getsockname()[1]}
        ports[busy] = taken.getsockname()[1]
        other.close()
        with pytest.raises(AglError, match=rf"{name} on 127\.0\.0\.1:{ports[busy]}: Address already in use"):
            ServerThread(store, **ports)
        socket.create_server(("127.0.0.1", other_port(ports, busy))).close()
    store.close()


def other_port(ports: dict[str, int], busy: str) -> int:
    (port,) = (port for name, port in ports.items() if name != busy)
    return port


def test_small_responses_on_a_kept_connection_do_not_wait_for_a_delayed_acknowledgement() -> None:
    server = AppThread()
    url = server.add(Starlette(routes=[Route("/", lambda _: PlainTextResponse("ok"), methods=["POST"])]))
    with server, httpx.Client() as client:
        times = [client.post(url, json={"n": number}).elapsed.total_seconds() for number in range(10)]
    # The kernel holds an acknowledgement back for 40 ms.
    assert min(times[1:]) < 0.03


def test_stop_releases_the_port_and_ends_the_thread() -> None:
    others = threading.enumerate()
    store = open_store("memory://")
    server = ServerThread(store, port=0, otlp_http_port=0)
    server.start()
    port = int(server.base_url.rpartition(":")[2])
    server.stop()
    server.stop()
    socket.create_server(("127.0.0.1", port)).close()
    assert not [thread for thread in threading.enumerate() if thread.name == "agl-server" and thread not in others]
    store.close()


def test_a_server_that_was_never_started_can_be_stopped() -> None:
    store = open_store("memory://")
    ServerThread(store, port=0, otlp_http_port=0).stop()
    store.close()


def test_a_host_of_another_machine_is_named() -> None:
    with pytest.raises(AglError, match=r"the engine cannot listen on 192\.0\.2\.1:0"):
        AppThread().add(Starlette(), host="192.0.2.1", name="engine")


def test_an_app_that_does_not_start_is_an_error() -> None:
    @asynccontextmanager
    async def broken(_: Starlette) -> AsyncIterator[None]:
        raise RuntimeError("no weights")
        yield

    server = AppThread()
    server.add(Starlette())
    server.add(Starlette(lifespan=broken))
    with pytest.raises(AglError, match="the server did not start"):
        server.start()


def test_a_request_in_progress_finishes_before_the_server_stops() -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow(_: Request) -> PlainTextResponse:
        entered.set()
        leave.wait(5)
        return PlainTextResponse("done")

    server = AppThread()
    url = server.add(Starlette(routes=[Route("/", slow)]))
    answers: list[str] = []
    with server:
        client = threading.Thread(target=lambda: answers.append(httpx.get(url).text))
        client.start()
        entered.wait(5)
        threading.Timer(0.2, leave.set).start()
    client.join()
    assert answers == ["done"]


def test_a_request_that_is_too_long_is_cancelled_without_noise(caplog: pytest.LogCaptureFixture) -> None:
    entered, ended = threading.Event(), threading.Event()

    async def endless(_: Request) -> PlainTextResponse:
        entered.set()
        try:
            await asyncio.sleep(600)
        finally:
            ended.set()
        return PlainTextResponse("done")

    server, statuses = AppThread(), list[int]()
    url = server.add(Starlette(routes=[Route("/", endless)]))
    with server:
        client = threading.Thread(target=lambda: statuses.append(httpx.get(url, timeout=60).status_code))
        client.start()
        assert entered.wait(5)
    client.join()
    assert ended.is_set() and statuses == [500] and not caplog.records
