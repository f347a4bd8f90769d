"""Access: tokens and scopes, cross-origin requests, size limits, TLS."""

import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import trustme

import agl.store
from agl import semconv
from agl.config import GatewayConfig, TlsConfig
from agl.errors import ConfigError
from agl.server.auth import BearerTokens
from agl.server.protocol import MAX_HEAD_BYTES
from agl.server_thread import ServerThread
from tests.core.fake_engine import WORDS, FakeEngine
from tests.gateway.serving import Setup, Store, chat_body, gateway

TOKENS = "all-of-it\nan-agent agent shop\na-reader read\nboth read,agent\nall-of-shop trainer shop\n"


@dataclass
class Guarded(Setup):
    stores: dict[str, agl.store.Store]
    """By project."""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Guarded"]:
    path = tmp_path_factory.mktemp("guard") / "tokens"
    path.write_text(TOKENS)
    store, engine = Store(), FakeEngine()
    tokens = BearerTokens.read("from-the-command", path)
    with ServerThread(store, port=0, otlp_http_port=0, upstream=engine.app, tokens=tokens) as server:
        yield Guarded(store, engine, server.base_url, server.stores)
    store.close()


@pytest.mark.parametrize(
    ("token", "calls", "reads", "steers"),
    [
        ("all-of-it", 200, 200, 200),
        ("from-the-command", 200, 200, 200),
        ("an-agent", 200, 403, 403),
        ("a-reader", 403, 200, 403),
        ("both", 200, 200, 403),
        ("wrong", 401, 401, 401),
        ("all-of-i", 401, 401, 401),
    ],
)
def test_a_token_allows_what_its_scopes_say(guarded: Setup, token: str, calls: int, reads: int, steers: int) -> None:
    headers = {"authorization": f"Bearer {token}"}
    for path in ("/v1/chat/completions", "/rollout/r/attempt/a/v1/chat/completions"):
        assert guarded.post(chat_body(), path, **headers).status_code == calls
    assert httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code == calls
    for path in ("/api/v1/count_spans", "/api/gateway", "/metrics"):
        assert httpx.get(guarded.url + path, headers=headers).status_code == reads
    assert httpx.post(f"{guarded.url}/api/gateway/resume", headers=headers).status_code == steers
    assert httpx.get(f"{guarded.url}/api/health").status_code == 200


def test_what_is_about_all_projects_takes_a_token_without_one(guarded: Guarded) -> None:
    headers = {"authorization": "Bearer all-of-shop"}
    assert httpx.get(f"{guarded.url}/api/v1/count_spans", headers=headers).status_code == 200
    shared = [
        ("GET", "/api/gateway"),
        ("GET", "/metrics"),
        ("POST", "/api/gateway/resume"),
        ("PATCH", "/api/gateway/x"),
    ]
    for method, path in shared:
        refused = httpx.request(method, guarded.url + path, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
        assert "needs a token without a project" in refused.json()["error"]["message"]


def test_an_error_names_the_missing_scope(guarded: Setup) -> None:
    with pytest.raises(openai.PermissionDeniedError, match="POST /v1/chat/completions needs the scope agent"):
        guarded.client().with_options(api_key="a-reader").chat.completions.create(**chat_body())


def test_the_call_has_the_project_of_the_token_and_never_the_token(
    guarded: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    guarded.store.appended.clear()
    for name, value in (("authorization", "Bearer an-agent"), ("x-api-key", "an-agent")):
        guarded.engine.headers.clear()
        path = f"/rollout/{name}/attempt/a/v1/chat/completions"
        assert guarded.post(chat_body(), path, **{name: value}).is_success
        (span,) = guarded.stores["shop"].query_spans(name)
        assert span.text(semconv.PROJECT) == "shop"
        assert "an-agent" not in f"{span} {guarded.engine.headers}"
    assert guarded.store.appended == []
    ours = [record for record in caplog.records if record.name.startswith(("agl", "uvicorn", "aiohttp", "asyncio"))]
    assert not [record for record in ours if "an-agent" in record.getMessage()]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("secret-token secret-other", r"line 2: expected a token, then scopes \(some of agent, trainer, read, .*other"),
        ("secret-token agent secret-shop more", r"line 2: expected a token, then scopes .* got more words"),
        ("secret-token agent secret-shop/../up", r"line 2: expected as the project a name of letters, digits"),
    ],
)
def test_the_error_for_an_invalid_line_does_not_show_its_token(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "tokens").write_text(f"fine\n{line}\n")
    with pytest.raises(ConfigError, match=reason) as caught:
        BearerTokens.read(None, tmp_path / "tokens")
    assert "secret-" not in str(caught.value)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_cross_origin_requests_are_rejected(setup: Setup, origin: str) -> None:
    answer = setup.post(chat_body(), origin=origin)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cross_origin")
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert setup.engine.seen == []
    assert setup.post(chat_body(), origin=setup.url).status_code == 200


def test_a_body_over_the_limit_is_refused() -> None:
    with gateway(max_body_bytes=1000) as setup:
        assert setup.post(chat_body()).status_code == 200
        for path in ("/v1/chat/completions", "/v1/embeddings"):
            answer = setup.post(chat_body("x" * 1000), path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
        assert len(setup.engine.seen) == 1


@pytest.mark.parametrize("head", ["x-long: " + "y" * MAX_HEAD_BYTES, "x: y\r\n" * (MAX_HEAD_BYTES // 5)])
@pytest.mark.parametrize("ends", [True, False])
def test_a_head_over_the_limit_is_refused_before_it_ends(setup: Setup, head: str, ends: bool) -> None:
    with socket.create_connection(("127.0.0.1", int(setup.url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n")
        connection.sendall(head.encode() + (b"\r\n\r\n" if ends else b""))
        assert connection.recv(1000).startswith(b"HTTP/1.1 431 ")
    assert setup.post(chat_body(), **{"x-long": "y" * (MAX_HEAD_BYTES // 2)}).status_code == 200


def test_the_gateway_serves_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    config = GatewayConfig(tls=TlsConfig(certificate=tmp_path / "both.pem", key=tmp_path / "both.pem"))
    store, engine = Store(), FakeEngine()
    with ServerThread(store, port=0, otlp_http_port=0, upstream=engine.app, gateway=config) as server:
        assert server.base_url.startswith("https://")
        trusting = httpx.Client(verify=ssl.create_default_context(cafile=tmp_path / "ca.pem"))
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", http_client=trusting)
        chunks = client.chat.completions.create(**chat_body(stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "".join(WORDS)
        trusting.close()
    assert len(store.appended) == 1
    store.close()


def test_the_error_for_invalid_tls_files_names_them(tmp_path: Path) -> None:
    (tmp_path / "junk.pem").write_text("junk")
    store = Store()
    config = GatewayConfig(tls=TlsConfig(certificate=tmp_path / "junk.pem", key=tmp_path / "junk.pem"))
    with pytest.raises(ConfigError, match=r"tls: .*junk\.pem cannot be used"):
        ServerThread(store, port=0, otlp_http_port=0, gateway=config)
    store.close()


def test_a_gateway_that_other_machines_reach_needs_a_token() -> None:
    store = Store()
    with pytest.raises(ConfigError, match=r"others can reach 0\.0\.0\.0: pass --token"):
        ServerThread(store, host="0.0.0.0", port=0, otlp_http_port=0)
    store.close()
