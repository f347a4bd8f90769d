"""One server for two projects: whichever way a request comes in, it is for rollouts of its token's project only."""

import base64
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import grpc
import httpx
import pytest

from agl import otlp, semconv
from agl.server.auth import BearerTokens, Grant
from agl.server_thread import ServerThread
from agl.span import Span
from agl.store import Rollout, open_store
from tests.core.fake_engine import FakeEngine
from tests.gateway.serving import Setup, Store, chat_body

EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
GRANTS = {"all": Grant(), "b-token": Grant(project="blue"), "r-token": Grant(project="red")}


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Setup, ServerThread]]:
    store, engine = Store(), FakeEngine()
    more: dict[str, Any] = {"port": 0, "otlp_http_port": 0, "otlp_grpc_port": 0, "upstream": engine.app}
    with ServerThread(store, tokens=BearerTokens(GRANTS), **more) as server:
        yield Setup(store, engine, server.base_url), server
    store.close()


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_calls_and_spans_go_to_the_rollout_of_their_token_by_every_way_in(shared: tuple[Setup, ServerThread]) -> None:
    setup, server = shared
    for token in ("b-token", "r-token"):
        named = {semconv.ROLLOUT_ID: "r", semconv.PROJECT: "blue"}  # What a span states of its project is ignored.
        spans = [Span("1" * 32, f"{number:016x}", None, f"{number} of {token}", number, 9, named) for number in (1, 2)]
        url, kind = f"{server.otlp_url}/v1/traces", {"content-type": "application/x-protobuf"}
        assert httpx.post(url, content=otlp.encode(spans[:1]), headers=bearer(token) | kind).status_code == 200
        assert server.otlp_grpc_url is not None
        with grpc.insecure_channel(server.otlp_grpc_url.removeprefix("http://")) as channel:
            metadata = tuple(bearer(token).items())
            channel.unary_unary(EXPORT)(otlp.encode(spans[1:]), metadata=metadata, timeout=10)
        assert setup.post(chat_body(token), "/rollout/r/attempt/a/v1/chat/completions", **bearer(token)).is_success
    for token, grant in GRANTS.items():
        with closing(open_store(server.base_url.replace("://", f"://{token}@"))) as store:
            found = store.query_spans("r")
        page = httpx.get(f"{server.base_url}/rollouts/view?id=r", headers=bearer(token))
        assert page.status_code == (404 if token == "all" else 200)
        if token == "all":
            assert found == []
            continue
        call = found[-1]
        assert [span.name for span in found] == [f"1 of {token}", f"2 of {token}", semconv.SPAN_GATEWAY_CALL]
        assert f'"{token}"' in (call.text(semconv.GATEWAY_REQUEST) or "")
        assert call.text(semconv.PROJECT) == grant.project


def test_the_gateway_remembers_nothing_of_one_project_for_another(shared: tuple[Setup, ServerThread]) -> None:
    setup, server = shared
    server.stores["blue"].enqueue_rollouts([Rollout("s", None, group_id="g", metadata={"seed": 7})])
    path, data = "/rollout/s/attempt/s-a1/v1/chat/completions", bytes(20_000)
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}
    words: Any = [image, {"type": "text", "text": "What is it?"}]
    setup.engine.seen.clear()
    for token in ("b-token", "r-token"):
        assert setup.post(chat_body(words), path, **bearer(token)).is_success
    first, second = setup.engine.seen
    assert "seed" in first and "seed" not in second
    for project, mode, group in (("blue", "train", "g"), ("red", "prod", None)):
        spans = {span.name: span for span in server.stores[project].query_spans("s")}
        call = spans[semconv.SPAN_GATEWAY_CALL]
        assert (call.text(semconv.MODE), call.text(semconv.GROUP_ID)) == (mode, group)
        assert data in spans[semconv.SPAN_MEDIA].attributes.values()
