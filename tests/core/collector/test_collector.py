"""The collector with the exporters of the OpenTelemetry SDK, over both transports."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import trustme
from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter as GrpcLogExporter
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcSpanExporter
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter as HttpLogExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpanExporter
from opentelemetry.sdk._logs.export import LogRecordExportResult
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from agl.errors import AglError, ConfigError
from agl.server_thread import ServerThread
from agl.store import open_store
from tests.core.collecting import RefusingStore, collecting

Collecting = tuple[RefusingStore, ServerThread]
Connect = Callable[..., SpanExporter]


def over_http(server: ServerThread, **options: Any) -> SpanExporter:
    return HttpSpanExporter(endpoint=f"{server.otlp_url}/v1/traces", **options)


def over_grpc(server: ServerThread, **options: Any) -> SpanExporter:
    return GrpcSpanExporter(endpoint=server.otlp_grpc_url, **options)


BOTH = pytest.mark.parametrize("connect", [over_http, over_grpc])


@pytest.fixture(scope="module")
def running() -> Iterator[Collecting]:
    with collecting() as collector:
        yield collector


def make_span(text: str = "hi") -> ReadableSpan:
    span = TracerProvider().get_tracer("scope").start_span("chat", attributes={"ids": b"\x01\x00", "text": text})
    span.end()
    assert isinstance(span, ReadableSpan)
    return span


def export(exporter: SpanExporter, *spans: ReadableSpan) -> bool:
    try:
        return exporter.export(spans) is SpanExportResult.SUCCESS
    finally:
        exporter.shutdown()


def stored(store: RefusingStore, span: ReadableSpan) -> int:
    assert span.context is not None
    return len(store.query_spans(f"{span.context.trace_id:032x}"))


@pytest.mark.parametrize(
    ("connect", "compression"),
    [
        (over_http, Compression.NoCompression),
        (over_http, Compression.Gzip),
        (over_http, Compression.Deflate),
        (over_grpc, grpc.Compression.NoCompression),
        (over_grpc, grpc.Compression.Gzip),
        (over_grpc, grpc.Compression.Deflate),
    ],
)
def test_spans_of_the_sdk_are_in_the_store_once_they_are_exported(
    running: Collecting, connect: Connect, compression: Any
) -> None:
    store, server = running
    span = make_span("long " * 1000)
    assert export(connect(server, compression=compression), span)
    assert span.context is not None
    (found,) = store.query_spans(f"{span.context.trace_id:032x}")
    assert (found.name, found.scope) == ("chat", "scope")
    assert found.attributes == {"ids": b"\x01\x00", "text": "long " * 1000}


@BOTH
def test_the_sdk_retries_until_the_store_has_committed(
    running: Collecting, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    store, server = running
    span = make_span()
    store.refusals = 2
    begin = time.monotonic()
    assert export(connect(server, timeout=20), span)
    assert (store.refusals, stored(store, span)) == (0, 1)
    assert time.monotonic() - begin > 1.5, "it came back sooner than the answers asked for"


@BOTH
def test_spans_that_are_sent_twice_are_kept_once(running: Collecting, connect: Connect) -> None:
    store, server = running
    span = make_span()
    assert export(connect(server), span)
    assert export(connect(server), span)
    assert stored(store, span) == 1


def test_too_many_senders_at_once_are_asked_to_retry_and_lose_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Two bodies fit; the store is slow at first; twelve senders over both transports lose nothing."""
    with collecting(max_body_bytes=50_000, max_pending_bytes=100_000) as (store, server):
        store.open.clear()
        spans = [make_span("x" * 40_000) for _ in range(12)]
        done: list[bool] = []
        senders = [
            threading.Thread(
                target=lambda span=span, connect=connect: done.append(export(connect(server, timeout=60), span))
            )
            for span, connect in zip(spans, [over_http, over_grpc] * 6, strict=True)
        ]
        for sender in senders:
            sender.start()
        time.sleep(1)
        assert store.count_spans() == 0
        store.open.set()
        for sender in senders:
            sender.join()
        assert done == [True] * 12
        assert store.count_spans() == 12
    assert "Transient error" in caplog.text


# --- other signals ----------------------------------------------------------------------------------------------------


def test_metrics_and_logs_are_answered_with_success(running: Collecting) -> None:
    _, server = running
    metrics = [
        HttpMetricExporter(endpoint=f"{server.otlp_url}/v1/metrics"),
        GrpcMetricExporter(endpoint=server.otlp_grpc_url),
    ]
    logs = [HttpLogExporter(endpoint=f"{server.otlp_url}/v1/logs"), GrpcLogExporter(endpoint=server.otlp_grpc_url)]
    assert {exporter.export(MetricsData([])) for exporter in metrics} == {MetricExportResult.SUCCESS}
    assert {exporter.export([]) for exporter in logs} == {LogRecordExportResult.SUCCESS}
    for exporter in (*metrics, *logs):
        exporter.shutdown()


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded() -> Iterator[Collecting]:
    with collecting("s3cret-one", "s3cret-two") as collector:
        yield collector


@BOTH
def test_each_of_several_tokens_is_accepted(guarded: Collecting, connect: Connect) -> None:
    store, server = guarded
    for token in ("s3cret-one", "s3cret-two"):
        span = make_span()
        assert export(connect(server, headers={"authorization": f"Bearer {token}"}), span)
        assert stored(store, span) == 1


@BOTH
@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer s3cret"}, {"authorization": "Basic s3cret-one"}])
def test_other_senders_are_rejected_without_retry_and_no_token_is_logged(
    guarded: Collecting, connect: Connect, headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    store, server = guarded
    caplog.set_level(logging.DEBUG, "agl")
    before = store.count_spans()
    begin = time.monotonic()
    assert not export(connect(server, headers=headers), make_span())
    assert time.monotonic() - begin < 1, "it was sent again"
    assert store.count_spans() == before
    assert "s3cret" not in "".join(record.getMessage() for record in caplog.records if record.name.startswith("agl"))


def test_the_gateway_takes_the_token_as_api_key_and_keeps_its_health_open(guarded: Collecting) -> None:
    _, server = guarded
    models = f"{server.base_url}/v1/models"
    assert httpx.get(models).status_code == 401
    assert httpx.get(models).json()["error"]["code"] == "invalid_api_key"
    # 503: let in, and there is no engine.
    assert httpx.get(models, headers={"authorization": "Bearer s3cret-one"}).status_code == 503
    assert httpx.get(f"{server.base_url}/api/health").status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_a_server_that_others_can_reach_needs_a_token(host: str) -> None:
    store = open_store("memory://")
    with pytest.raises(ConfigError, match="pass --token"):
        ServerThread(store, host=host, port=0, otlp_http_port=0, otlp_grpc_port=0)
    store.close()


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate authority, a certificate for this machine and one for a sender."""
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name, issued in {
        "server": authority.issue_cert("127.0.0.1"),
        "sender": authority.issue_cert("me@x.org"),
    }.items():
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
    return folder


@pytest.fixture
def no_other_authorities(monkeypatch: pytest.MonkeyPatch) -> None:
    """`requests` prefers these variables to the file that an exporter sets."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)


def trusting(connect: Connect, pem: Path, sender: str | None = None) -> dict[str, Any]:
    """Options of an exporter that trusts our authority and presents the certificate of `sender`."""
    files = {"ca": pem / "ca.pem"} | ({"cert": pem / f"{sender}.pem", "key": pem / f"{sender}.key"} if sender else {})
    if connect is over_http:
        shown = {"client_certificate_file": str(files["cert"]), "client_key_file": str(files["key"])} if sender else {}
        return {"certificate_file": str(files["ca"]), **shown}
    read = {name: path.read_bytes() for name, path in files.items()}
    return {"credentials": grpc.ssl_channel_credentials(read["ca"], read.get("key"), read.get("cert"))}


@BOTH
@pytest.mark.usefixtures("no_other_authorities")
def test_spans_travel_encrypted(pem: Path, connect: Connect) -> None:
    with collecting(tls={"certificate": pem / "server.pem", "key": pem / "server.key"}) as (store, server):
        span = make_span()
        assert export(connect(server, **trusting(connect, pem)), span)
        assert stored(store, span) == 1
        assert not export(connect(server, timeout=0.5), make_span()), "an authority that nobody trusts"


@BOTH
@pytest.mark.usefixtures("no_other_authorities")
def test_senders_may_need_a_certificate(pem: Path, connect: Connect) -> None:
    tls = {"certificate": pem / "server.pem", "key": pem / "server.key", "client_ca": pem / "ca.pem"}
    with collecting(tls=tls) as (store, server):
        assert not export(connect(server, timeout=0.5, **trusting(connect, pem)), make_span())
        assert export(connect(server, **trusting(connect, pem, "sender")), make_span())
        assert store.count_spans() == 1


@pytest.mark.parametrize(
    ("certificate", "key"), [("server.pem", "sender.key"), ("server.pem", "nowhere.key"), ("ca.txt", "server.key")]
)
def test_tls_files_that_cannot_be_loaded_are_named(pem: Path, certificate: str, key: str) -> None:
    (pem / "ca.txt").write_text("no certificate")
    with (
        pytest.raises(AglError, match=rf"tls: .*{certificate}.*{key} cannot be used"),
        collecting(tls={"certificate": pem / certificate, "key": pem / key}),
    ):
        pass
