"""The names under which clients may address a server: no page whose name was rebound to loopback gets in."""

import socket
from collections.abc import Iterator

import grpc
import httpx
import pytest

from agl import otlp
from agl.collector.http import PROTOBUF
from agl.server.api_error import ApiError
from agl.server.auth import AllowedHosts
from agl.server_thread import ServerThread
from agl.span import Span
from agl.store import open_store
from tests.core.collector.test_collector_grpc import EXPORT

BODY = otlp.encode([Span("a" * 32, "b" * 16, None, "chat", 1, 2)])


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    store = open_store("memory://")
    with ServerThread(store, port=0, otlp_http_port=0, otlp_grpc_port=0, allowed_hosts=["agl.internal"]) as server:
        yield server
    store.close()


@pytest.mark.parametrize(
    ("host", "is_allowed"),
    [
        ("localhost", True),
        ("LOCALHOST.:1", True),
        ("127.9.9.9:80", True),
        ("[::1]:8400", True),
        ("agl.internal:8400", True),
        ("evil.example", False),
        ("evil.example:8400", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("192.0.2.7", False),
        ("[bad", False),
        ("", False),
    ],
)
def test_every_port_takes_requests_for_its_own_names_only(server: ServerThread, host: str, is_allowed: bool) -> None:
    headers = {"host": host, "origin": f"http://{host}", "content-type": PROTOBUF}
    answers = [
        httpx.get(f"{server.base_url}/api/health", headers=headers),
        httpx.get(f"{server.base_url}/api/v1/rollout_ids", headers=headers),
        httpx.post(f"{server.base_url}/api/gateway/resume", headers=headers),
        httpx.post(f"{server.otlp_url}/v1/traces", headers=headers, content=BODY),
    ]
    assert {answer.status_code for answer in answers} == {200 if is_allowed else 421}
    assert is_allowed or "server.allowed_hosts" in answers[0].json()["error"]["message"]


@pytest.mark.parametrize(("host", "is_allowed"), [("evil.example:1", False), ("agl.internal", True), ("[::1]:1", True)])
def test_grpc_takes_requests_for_its_own_names_only(server: ServerThread, host: str, is_allowed: bool) -> None:
    address = str(server.otlp_grpc_url).removeprefix("http://")
    with grpc.insecure_channel(address, options=[("grpc.default_authority", host)]) as channel:
        call = channel.unary_unary(EXPORT).future(BODY, timeout=20)
        assert call.code() is (grpc.StatusCode.OK if is_allowed else grpc.StatusCode.PERMISSION_DENIED)
        assert is_allowed or "server.allowed_hosts" in str(call.details())


def test_a_server_on_all_addresses_takes_any_address_and_the_name_of_the_machine() -> None:
    hosts = AllowedHosts("0.0.0.0")
    for host in ("192.0.2.7:8400", "[2001:db8::1]", socket.gethostname(), "localhost"):
        hosts.check([host])
    for given in (["evil.example"], [], ["localhost", "localhost"]):
        with pytest.raises(ApiError, match=r"use 127\.0\.0\.1, or add the name"):
            hosts.check(given)
    AllowedHosts("store-host").check(["Store-Host:1"])


def test_a_request_of_http_1_0_needs_no_host(server: ServerThread) -> None:
    host, port = server.base_url.removeprefix("http://").split(":")
    for version, status in ((b"1.0", b"200"), (b"1.1", b"421")):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(b"GET /api/health HTTP/" + version + b"\r\n\r\n")
            assert connection.recv(4096).split()[1] == status
