"""Fixtures: a gateway that the tests of a module share."""

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agl.config import GatewayConfig
from agl.server_thread import ServerThread
from tests.core.fake_engine import FakeEngine
from tests.gateway.serving import Setup, Store


@pytest.fixture(scope="module")
def served() -> Iterator[Setup]:
    store, engine = Store(), FakeEngine()
    config = GatewayConfig(extra_body={"return_token_ids": True, "top_k": 50, "max_tokens": 77})
    overrides = {"train": {"temperature": 1.0}, "eval": {"temperature": 0.0}}
    with ServerThread(
        store, port=0, otlp_http_port=0, upstream=engine.app, gateway=config, overrides=overrides
    ) as server:
        yield Setup(store, engine, server.base_url)
    store.close()


@pytest.fixture
def setup(served: Setup) -> Setup:
    served.store.delay_s, served.store.refusing, served.store.refused_rollout = 0.0, False, ""
    served.store.appended.clear()
    served.engine.seen.clear()
    served.engine.headers.clear()
    served.engine.streams_cut = 0
    return served


@pytest.fixture
def spans(memory: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    """The spans of this test: `spans.get_finished_spans()`."""
    memory.clear()
    yield memory
    memory.clear()
