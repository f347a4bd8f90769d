"""The store over HTTP, besides the contract: status codes, retries, tokens, long polls and the OpenAPI document."""

import inspect
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from starlette.applications import Starlette

from agl import otlp
from agl.config import CollectorConfig, TlsConfig
from agl.config.collector import TOKEN_VARIABLE
from agl.config.section import DEFAULT_PROJECT
from agl.errors import StoreError, TransitionError, UnknownIdError
from agl.server.app_thread import AppThread
from agl.server.auth import BearerTokens
from agl.server_thread import ServerThread
from agl.store import AttemptState, Resource, Rollout, Store, open_store
from agl.store.http import client, routes
from agl.store.http.client import HttpStore
from agl.store.http.routes import StoreApi
from agl.store.http.verb import JSON, PREFIX, PROTOBUF, VERBS
from tests.ports import free_port
from tests.store.spans import make_span

LIMIT = 100_000
SECRET = "hush-hush"


class FailingStore:
    """A store in memory whose next `failures` verbs fail as on a full disk."""

    def __init__(self) -> None:
        self.failures = 0
        self._store = open_store("memory://")

    def __getattr__(self, name: str) -> Any:
        return self._fail if self.failures and name in VERBS else getattr(self._store, name)

    def _fail(self, *_: Any, **__: Any) -> None:
        self.failures -= 1
        raise StoreError("the disk is full")


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[FailingStore, str]]:
    """A store, and the URL where `agl serve` would serve it."""
    store = FailingStore()
    config = CollectorConfig(max_body_bytes=LIMIT, max_pending_bytes=2 * LIMIT)
    with ServerThread(store, port=0, otlp_http_port=0, collector=config) as server:
        yield store, server.base_url
    store.close()


@pytest.fixture
def url(served: tuple[FailingStore, str]) -> str:
    return served[1]


@pytest.fixture
def remote(url: str) -> Iterator[Store]:
    with closing(open_store(url)) as store:
        yield store


def post(url: str, verb: str, body: Any, content_type: str = JSON) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{url}{PREFIX}/{verb}", content=content, headers={"content-type": content_type})


# --- The wire ----------------------------------------------------------------------------------------------------


def test_every_verb_of_the_protocol_is_served() -> None:
    verbs = {name for name, _ in inspect.getmembers(Store, inspect.isfunction) if not name.startswith("_")}
    assert set(VERBS) == verbs - {
        "append_spans",
        "query_spans",
        "query_spans_by_rollout",
        "read_spans",
        "close",
    }  # Derived, or local to the process.


def test_spans_are_otlp_and_everything_else_is_json(url: str) -> None:
    span = make_span(1, rollout="wire", text="x")
    answer = post(url, "append_spans", otlp.encode([span]), PROTOBUF)
    assert (answer.status_code, answer.json()) == (200, {"result": 1})
    answer = httpx.get(f"{url}{PREFIX}/query_spans", params={"rollout_id": "wire"})
    assert (answer.headers["content-type"], otlp.decode(answer.content)) == (PROTOBUF, [span])
    assert post(url, "enqueue_rollouts", {"rollouts": [{"rollout_id": "wire", "input": [1]}]}).json() == {
        "result": None
    }
    found = httpx.get(f"{url}{PREFIX}/get_rollout?rollout_id=wire").json()["result"]
    assert (found["input"], found["state"], found["max_attempts"]) == ([1], "queued", 1)
    assert sorted(found["retry_on"]) == ["failed", "timeout", "unresponsive"]


@pytest.mark.parametrize(
    ("verb", "body", "status", "code", "message"),
    [
        ("finish_attempt", {"attempt_id": "x-a1", "state": "failed"}, 404, "unknown_id", "no attempt 'x-a1'"),
        ("cancel_rollouts", {"rollout_ids": ["x"]}, 404, "unknown_id", "no rollout 'x'"),
        ("finish_attempt", {"attempt_id": "done-a1", "state": "failed"}, 409, "refused_transition", "is succeeded"),
        ("finish_attempt", {"attempt_id": "x-a1", "state": "lost"}, 422, "invalid", "finish_attempt: state: "),
        ("heartbeat", {}, 422, "invalid", "heartbeat: attempt_ids: Field required"),
        ("heartbeat", b"{", 422, "invalid", "heartbeat: the body: Invalid JSON"),
        ("gc", {"older_than": 1}, 422, "invalid", "gc: older_than: Extra inputs are not permitted"),
        ("gc", {"older_than_s": -1}, 422, "invalid", "older_than_s is -1, expected seconds from 0"),
        ("gc", {"older_than_s": 1e300}, 422, "invalid", "older_than_s is 1e+300, expected seconds from 0"),
        ("gc", {"max_bytes": -1}, 422, "invalid", "max_bytes is -1, expected a number of bytes from 0"),
        ("enqueue_rollouts", {"rollouts": [{"rollout_id": "x"}]}, 422, "invalid", "rollouts.0.input: Field required"),
        ("enqueue_rollouts", {"rollouts": [{"rollout_id": "x", "input": 1, "grup": 1}]}, 422, "invalid", "0.grup: "),
        ("enqueue_rollouts", {"rollouts": [{"rollout_id": "x", "input": 1, "timeout_s": 0}]}, 422, "invalid", "x has"),
        ("put_resource", {"resource": {"name": "w", "version": 2**70, "uri": "u"}}, 422, "invalid", "too large"),
        ("heartbeat", b" " * (LIMIT + 1), 413, "too_large", f"over {LIMIT} bytes"),
        ("count_spans", {}, 405, "unknown_url", "does not serve POST"),
        ("drop_tables", {}, 404, "unknown_url", "does not serve POST"),
    ],
)
def test_errors_have_one_shape(
    url: str, remote: Store, verb: str, body: Any, status: int, code: str, message: str
) -> None:
    remote.enqueue_rollouts([Rollout("done", 1)])
    if remote.lease_rollout("worker", "done"):
        remote.finish_attempt("done-a1", AttemptState.SUCCEEDED)
    answer = post(url, verb, body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert message in answer.json()["error"]["message"]
    assert ("allow" in answer.headers) == (status == 405)


def test_a_body_with_an_invalid_span_is_rejected_as_a_whole(url: str, remote: Store) -> None:
    before = remote.count_spans()
    bad = otlp.encode([make_span(7)]) + otlp.encode([make_span(8)]).replace(bytes.fromhex(f"{8:016x}"), bytes(8))
    for body in (b"\xff", bad):
        assert post(url, "append_spans", body, PROTOBUF).status_code == 422
    assert remote.count_spans() == before


def test_web_pages_cannot_post(url: str) -> None:
    """A web page may send these content types to another origin without a preflight request."""
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert post(url, "gc", {"max_bytes": 0}, content_type).status_code == 415


def test_nan_and_infinity_are_written_as_strings(url: str, remote: Store) -> None:
    remote.append_metrics("nan", 1, {"loss": float("nan"), "reward": float("-inf")})
    answer = httpx.get(f"{url}{PREFIX}/query_metrics", params={"run": "nan"}).json()
    assert answer == {"result": {"loss": [[1, "NaN"]], "reward": [[1, "-Infinity"]]}}


@pytest.mark.parametrize("odd", ["", "a/b", "..", "a b&c=d?#%2F", "ü\N{SNOWMAN}", "1", "null"])
def test_ids_may_be_any_text(remote: Store, odd: str) -> None:
    remote.enqueue_rollouts([Rollout(odd, None, group_id=odd)])
    found = remote.get_rollout(odd)
    assert found is not None and found.rollout_id == odd
    assert remote.query_rollouts(odd) == [found]


@pytest.mark.parametrize("value", [object(), b"\xff", {1, 2}, "\ud800"])
def test_values_that_json_cannot_express_are_rejected_before_they_are_sent(remote: Store, value: object) -> None:
    with pytest.raises(StoreError, match=r"enqueue_rollouts|the input of rollout odd"):
        remote.enqueue_rollouts([Rollout("odd", value)])
    with pytest.raises(StoreError, match=r"put_resource|the metadata of writer@0"):
        remote.put_resource(Resource("writer", 0, "u", {"value": value}))


def test_errors_come_back_as_the_store_raised_them(remote: Store) -> None:
    with pytest.raises(UnknownIdError, match="the store holds no attempt 'x-a1'"):
        remote.heartbeat(["x-a1"])
    remote.enqueue_rollouts([Rollout("twice", 1)])
    remote.lease_rollout("worker", "twice")
    remote.finish_attempt("twice-a1", AttemptState.SUCCEEDED)
    with pytest.raises(TransitionError, match="attempt twice-a1 is succeeded"):
        remote.finish_attempt("twice-a1", AttemptState.SUCCEEDED)
    with pytest.raises(StoreError, match=f"over {LIMIT} bytes"):
        remote.enqueue_rollouts([Rollout("big", "x" * LIMIT)])


# --- Repeats -----------------------------------------------------------------------------------------------------


def test_a_verb_is_retried_while_the_store_is_unavailable(
    served: tuple[FailingStore, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, url = served
    store.failures = 1
    answer = httpx.get(f"{url}{PREFIX}/count_spans")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["message"] == "the disk is full"
    with closing(HttpStore(url)) as remote:
        store.failures = 1
        remote.append_metrics("again", 1, {"loss": 0.5})
        assert (store.failures, remote.query_metrics("again")) == (0, {"loss": [(1, 0.5)]})
        monkeypatch.setattr(client, "_TRY_FOR_S", 0.5)
        store.failures = 1
        with pytest.raises(StoreError, match=r"did not do count_spans for 0.5 s: the disk is full"):
            remote.count_spans()
    assert store.failures == 0


def test_a_verb_is_retried_while_the_server_is_down() -> None:
    with closing(open_store("memory://")) as store:
        api = StoreApi({DEFAULT_PROJECT: store})
        with closing(api), closing(HttpStore(f"http://127.0.0.1:{free_port()}")) as remote:
            waiter = threading.Timer(0.5, serve_once, (api, remote))
            waiter.start()
            remote.enqueue_rollouts([Rollout("late", 1)])
            assert store.get_rollout("late") is not None
            waiter.join()


def serve_once(api: StoreApi, remote: HttpStore) -> None:
    """Serve at the address of `remote` for one second."""
    with serving(api, int(remote.uri.rpartition(":")[2])):
        time.sleep(1)


def serving(api: StoreApi, port: int = 0) -> AppThread:
    server = AppThread()
    server.add(starlette(api), port=port)
    return server


def starlette(api: StoreApi) -> Starlette:
    return Starlette(routes=api.routes())


class LossyProxy:
    """A proxy to `url` that drops the next `losses` responses and closes their connections."""

    def __init__(self, url: str) -> None:
        self.losses = 0
        self._target = int(url.rpartition(":")[2])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            for source, sink, loses in ((near, far, False), (far, near, True)):
                threading.Thread(target=self._pass_on, args=(source, sink, loses), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, loses: bool) -> None:
        with source, sink:
            while data := receive(source):
                if loses and self.losses:
                    self.losses -= 1
                    break
                sink.sendall(data)
            for end in (source, sink):
                hang_up(end)


def receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65536)
    except OSError:
        return b""


def hang_up(connection: socket.socket) -> None:
    with suppress(OSError):  # Closed by the other side already.
        connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def lossy(url: str) -> Iterator[tuple[LossyProxy, Store]]:
    with closing(LossyProxy(url)) as proxy, closing(open_store(proxy.url)) as store:
        yield proxy, store


def test_a_verb_whose_response_was_lost_is_repeated(lossy: tuple[LossyProxy, Store]) -> None:
    proxy, store = lossy
    span = make_span(1, trace="9" * 32, rollout="lost")
    steps: list[Callable[[], object]] = [
        lambda: store.enqueue_rollouts([Rollout("lost", 1)]),
        lambda: store.append_spans([span]),
        lambda: store.put_resource(Resource("lost", 0, "u")),
        lambda: store.lease_resource("lost", "me", 60),
    ]
    for step in steps:
        proxy.losses = 1
        step()
        assert proxy.losses == 0
    assert store.query_spans("lost") == [span]
    assert store.get_rollout("lost") is not None


def test_a_lease_whose_response_was_lost_is_not_repeated(lossy: tuple[LossyProxy, Store]) -> None:
    proxy, store = lossy
    store.enqueue_rollouts([Rollout("leased", 1)])
    proxy.losses = 1
    with pytest.raises(StoreError, match="may or may not have done lease_rollout"):
        store.lease_rollout("worker", "leased")
    assert [attempt.number for attempt in store.query_attempts("leased")] == [1]


def test_finish_attempt_whose_response_was_lost_has_ended_the_attempt(lossy: tuple[LossyProxy, Store]) -> None:
    proxy, store = lossy
    store.enqueue_rollouts([Rollout("ended", 1)])
    store.lease_rollout("worker", "ended")
    proxy.losses = 1
    with pytest.raises(TransitionError, match="is failed and cannot become failed"):
        store.finish_attempt("ended-a1", AttemptState.FAILED, "x")
    assert [(attempt.state, attempt.error) for attempt in store.query_attempts("ended")] == [("failed", "x")]


# --- Waiting -----------------------------------------------------------------------------------------------------


def test_a_wait_returns_within_its_limit_and_the_client_repeats_it(
    url: str, remote: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (routes, client):
        monkeypatch.setattr(module, "MAX_WAIT_S", 0.3)
    remote.enqueue_rollouts([Rollout("slow", 1, group_id="slow")])
    for verb, body in (("wait_for_rollouts", {"rollout_ids": ["slow"]}), ("wait_for_group", {"group_id": "slow"})):
        began = time.monotonic()
        (rollout,) = post(url, verb, body).json()["result"]
        assert rollout["state"] == "queued" and 0.3 <= time.monotonic() - began < 3
    timer = threading.Timer(1, remote.cancel_rollouts, (["slow"],))
    timer.start()
    (ended,) = remote.wait_for_group("slow")
    timer.join()
    assert ended.state.is_over


def test_waiting_clients_do_not_block_other_verbs(remote: Store) -> None:
    remote.enqueue_rollouts([Rollout("awaited", 1)])
    waiters = [threading.Thread(target=remote.wait_for_rollouts, args=(["awaited"], 30)) for _ in range(40)]
    for waiter in waiters:
        waiter.start()
    time.sleep(0.5)
    began = time.monotonic()
    remote.count_spans()
    remote.cancel_rollouts(["awaited"])
    for waiter in waiters:
        waiter.join(10)
    assert time.monotonic() - began < 10
    assert not any(waiter.is_alive() for waiter in waiters)


# --- Tokens and TLS ----------------------------------------------------------------------------------------------


def test_the_token_is_required_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with (
        closing(open_store("memory://")) as store,
        ServerThread(store, port=0, otlp_http_port=0, tokens=BearerTokens([SECRET])) as server,
    ):
        with closing(open_store(server.base_url)) as stranger, pytest.raises(StoreError, match="set AGL_TOKEN"):
            stranger.count_spans()
        assert httpx.get(f"{server.base_url}{PREFIX}/openapi.json").status_code == 401
        for uri in (with_token(server.base_url, SECRET), with_token(server.base_url, f"me:{SECRET}")):
            with closing(open_store(uri)) as remote:
                assert (remote.count_spans(), remote.uri) == (0, server.base_url)
        monkeypatch.setenv(TOKEN_VARIABLE, SECRET)
        with closing(open_store(server.base_url)) as remote:
            assert remote.count_spans() == 0
    assert SECRET not in caplog.text


def with_token(url: str, token: str) -> str:
    return url.replace("://", f"://{token}@")


@pytest.mark.parametrize("uri", ["http://", "http://h:x", "https://h/?a=b", "http://h:99999", "http://h#f"])
def test_an_invalid_uri_is_rejected_without_its_token(uri: str) -> None:
    with pytest.raises(StoreError, match=r"http://HOST:PORT") as refused:
        open_store(with_token(uri, SECRET))
    assert SECRET not in str(refused.getrepr(style="long"))


def test_tls_servers_are_accepted_if_their_certificate_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, files = trustme.CA(), [tmp_path / name for name in ("certificate.pem", "key.pem", "ca.pem")]
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(str(files[0]))
    issued.private_key_pem.write_to_path(str(files[1]))
    authority.cert_pem.write_to_path(str(files[2]))
    server = AppThread()
    with closing(open_store("memory://")) as store, closing(StoreApi({DEFAULT_PROJECT: store})) as api:
        url = server.add(starlette(api), tls=TlsConfig(certificate=files[0], key=files[1]))
        with server:
            began = time.monotonic()
            with closing(open_store(url)) as remote, pytest.raises(StoreError, match="CERTIFICATE_VERIFY_FAILED"):
                remote.count_spans()
            assert time.monotonic() - began < 5  # It is not retried.
            monkeypatch.setenv("SSL_CERT_FILE", str(files[2]))
            with closing(open_store(url)) as remote:
                assert remote.count_spans() == 0


# --- The document ------------------------------------------------------------------------------------------------


def test_the_document_describes_every_verb(url: str) -> None:
    document = httpx.get(f"{url}{PREFIX}/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    served = {operation["operationId"] for path in document["paths"].values() for operation in path.values()}
    assert served == set(VERBS)
    lease = document["paths"][f"{PREFIX}/lease_rollout"]["post"]
    assert lease["description"].startswith("The rollout queued first")
    schemas = document["components"]["schemas"]
    assert {name.removeprefix("#/components/schemas/") for name in references(document)} <= set(schemas)
    assert {"rollout_id", "input", "retry_on", "timeout_s"} <= set(schemas["Rollout-Input"]["properties"])
    assert "for longer is ended as TIMEOUT" in schemas["Rollout-Input"]["properties"]["timeout_s"]["description"]


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from [value["$ref"]] if "$ref" in value else []
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from references(item)
