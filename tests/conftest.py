"""Finished spans in memory for the tests of every package, and how tests are distributed over worker processes."""

import os
import signal

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agl.context import RolloutProcessor

# A background process of a shell ignores Ctrl-C, and so do its children; several tests send it to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Test processes share the cores, so an OpenMP thread that waits must sleep, not spin. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

LONGEST = (
    "tests/flows/test_demo.py",
    "cassandra",
    "tests/store/test_cassandra.py",
    "tests/trainer/compute/test_devices.py",
    "tests/flows/test_training.py",
    "tests/gateway/test_clients.py",
    "tests/foreign/test_trajectories.py",
    "tests/langchain/test_oldest.py",
    "tests/trainer/model/test_flex.py",
    "tests/trainer/model/test_compiled.py",
    "tests/core/cli/test_cli.py",
    "tests/queue/test_faults.py",
    "tests/store/test_faults.py",
)
"""Units that take longest, which workers begin with, so that all end at about the same time."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a worker process of pytest-xdist: assign each test to its unit, and put the longest units first."""
    if hasattr(config, "workerinput"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(unit(item)))
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(unit(item), len(places)))


def unit(item: pytest.Item) -> str:
    """Tests that one worker runs one after another: those of a file, or of a store's backend, which share a server."""
    call = getattr(item, "callspec", None)
    backend = call.params.get("new_uri") if call else None
    return backend.name if backend else item.nodeid.partition("::")[0]


@pytest.fixture(scope="session")
def memory() -> InMemorySpanExporter:
    """On the global provider, which a process sets once."""
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        trace.set_tracer_provider(TracerProvider())
    provider = trace.get_tracer_provider()
    assert isinstance(provider, TracerProvider)
    exporter = InMemorySpanExporter()
    provider.add_span_processor(RolloutProcessor())
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter
