"""A system clock that goes back by a second at each reading, as if NTP set it again and again."""

import itertools
import time

import pytest
from opentelemetry.sdk import trace


def step_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this process, and OpenTelemetry in it, such a clock."""
    now, readings = time.time_ns(), itertools.count()

    def read() -> int:
        return now - next(readings) * 10**9

    monkeypatch.setattr(time, "time_ns", read)
    monkeypatch.setattr(trace, "time_ns", read)
