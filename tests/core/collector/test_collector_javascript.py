"""The collector with the exporters of OpenTelemetry's JavaScript SDK. Needs node and npm."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agl.server_thread import ServerThread
from tests.core.collecting import RefusingStore, collecting
from tests.node import folder_with

SOURCE = Path(__file__).parent / "javascript"

Collecting = tuple[RefusingStore, ServerThread]


@pytest.fixture(scope="session")
def exporters() -> Path:
    """A folder with the script and its dependencies."""
    return folder_with("javascript", SOURCE)


@pytest.fixture(scope="module")
def running() -> Iterator[Collecting]:
    with collecting("a secret") as collector:
        yield collector


def export(
    exporters: Path, server: ServerThread, kind: str, compression: str = "none", token: str = "a%20secret"
) -> Any:
    url = server.otlp_grpc_url if kind == "grpc" else f"{server.otlp_url}/v1/traces"
    environment = os.environ | {"OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer%20{token}"}
    done = subprocess.run(
        ["node", "export.js", kind, str(url), compression],
        cwd=exporters,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["json", "proto", "grpc"])
@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_spans_of_the_javascript_sdk_are_in_the_store(
    exporters: Path, running: Collecting, kind: str, compression: str
) -> None:
    store, server = running
    said = export(exporters, server, kind, compression)
    assert (said["ok"], said["error"]) == (True, None)
    spans = {span.name: span for span in store.query_spans(said["trace"])}
    assert spans.keys() == {"agent", "chat a", "chat b"}
    root = spans["agent"]
    assert root.attributes == {"agl.role": "planner", "ids": [1, 2, 3], "score": 0.5, "ok": True}
    assert {spans[name].parent_id for name in ("chat a", "chat b")} == {root.span_id}
    assert spans["chat b"].attributes == {"text": "näh b"}
    assert 0 < root.start_ns <= root.end_ns


@pytest.mark.parametrize("kind", ["json", "proto", "grpc"])
def test_the_javascript_sdk_reports_a_wrong_token(exporters: Path, running: Collecting, kind: str) -> None:
    store, server = running
    before = store.count_spans()
    assert not export(exporters, server, kind, token="wrong")["ok"]
    assert store.count_spans() == before


@pytest.mark.parametrize("kind", ["json", "proto"])
def test_the_javascript_sdk_retries_after_a_store_error(exporters: Path, running: Collecting, kind: str) -> None:
    """Over HTTP only: the gRPC exporter gives up after the first error, whatever its status."""
    store, server = running
    store.refusals = 1
    said = export(exporters, server, kind)
    assert (said["ok"], store.refusals) == (True, 0)
    assert len(store.query_spans(said["trace"])) == 3
