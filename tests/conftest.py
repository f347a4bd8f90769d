"""Finished spans in memory for the tests of every package, and how tests are distributed over worker processes."""

import os
import signal
from typing import Any

import pytest
from hypothesis import settings
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agl.context import RolloutProcessor

# A background process of a shell ignores Ctrl-C, and so do its children; several tests send it to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Test processes share the cores, so an OpenMP thread that waits must sleep, not spin. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


# Several hundred processes that tests start would each compile our modules, and those of pytest's workers our tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


# The same examples in each run, and no limit on their time, which a busy machine exceeds. Others are tried with
# `pytest --hypothesis-profile default`.
settings.load_profile("ci")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--numprocesses`: distribute units instead of single tests."""
    from tests.units import UnitScheduling  # Here: only a run in several processes needs pytest-xdist.

    return UnitScheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a process of `--numprocesses`: put the longest units first."""
    if hasattr(config, "workerinput"):
        from tests.units import place_of

        items.sort(key=lambda item: place_of(item.nodeid))


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
