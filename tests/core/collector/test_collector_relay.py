"""Another collector between a sender and ours: Rotel, an OpenTelemetry collector in Rust, which PyPI has.

It takes what the SDK exports and sends that on in batches of its own, over HTTP or gRPC, plain or with gzip.
"""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link

from agl.server_thread import ServerThread
from tests.core.collecting import RefusingStore, collecting
from tests.ports import free_port
from tests.venv import python_with
from tests.waiting import wait_until

Collecting = tuple[RefusingStore, ServerThread]
SPANS = 300


@pytest.fixture(scope="session")
def rotel() -> Path:
    """Path of the program."""
    python = python_with("rotel", "rotel==0.0.1a15", over_ours=False)
    (program,) = python.parents[1].glob("lib/python*/site-packages/rotel/rotel-agent")
    program.chmod(0o755)  # The wheel brings it without the right to be run; its Python wrapper gives it.
    return program


@pytest.fixture(scope="module")
def running() -> Iterator[Collecting]:
    with collecting("a-secret") as collector:
        yield collector


@contextmanager
def relaying(program: Path, server: ServerThread, protocol: str, compression: str) -> Iterator[str]:
    """A relay to `server`; yields the URL at which it receives spans."""
    http, grpc = free_port(), free_port()
    to = server.otlp_grpc_url if protocol == "grpc" else server.otlp_url
    options = {
        "otlp-http-endpoint": f"127.0.0.1:{http}",
        "otlp-grpc-endpoint": f"127.0.0.1:{grpc}",
        "otlp-exporter-endpoint": to,
        "otlp-exporter-protocol": protocol,
        "otlp-exporter-compression": compression,
        "otlp-exporter-custom-headers": "authorization=Bearer a-secret",
        "otlp-exporter-retry-initial-backoff": "100ms",
    }
    command = [str(program), "start", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    process = subprocess.Popen(command, env=os.environ | {"ROTEL_LOG_LEVEL": "error"}, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: accepts(http))
        yield f"http://127.0.0.1:{http}/v1/traces"
    finally:
        process.terminate()
        process.wait(30)


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def send(url: str) -> str:
    """Spans of one trace, each with a link to the root; returns the id of the trace."""
    provider = TracerProvider(resource=Resource({"service.name": "agent"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    tracer = provider.get_tracer("scope", "1.2")
    with tracer.start_as_current_span("agent") as root:
        for number in range(SPANS - 1):
            with tracer.start_as_current_span("chat", links=[Link(root.get_span_context())]) as span:
                span.set_attributes({"number": number, "ids": [1, 2, 3], "raw": b"\x00\xff"})
    provider.shutdown()
    return f"{root.get_span_context().trace_id:032x}"


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_spans_relayed_by_another_collector_are_kept_once_and_complete(
    rotel: Path, running: Collecting, protocol: str, compression: str
) -> None:
    store, server = running
    with relaying(rotel, server, protocol, compression) as url:
        store.refusals = 1  # It is asked to try again, and does.
        trace_id = send(url)
        wait_until(lambda: len(store.query_rows(trace_id)) == SPANS)
    assert store.refusals == 0
    spans = store.query_spans(trace_id)
    assert sorted(span.attributes["number"] for span in spans if span.name == "chat") == list(range(SPANS - 1))
    assert {span.resource["service.name"] for span in spans} == {"agent"}
    assert spans[-1].attributes == {"number": SPANS - 2, "ids": [1, 2, 3], "raw": b"\x00\xff"}
