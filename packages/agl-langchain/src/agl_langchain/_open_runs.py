"""The runs that have not ended."""

import threading
import time
from typing import TYPE_CHECKING
from uuid import UUID

if TYPE_CHECKING:
    from agl_langchain._run import Run

MAX_OPEN = 50_000
"""Most runs held open; beyond it the oldest is given up."""
MAX_SECONDS = 24 * 3600
"""A run that is open for longer is given up: its end was never reported."""


class OpenRuns:
    """Runs by id; bounded in number and in age."""

    def __init__(self, max_open: int = MAX_OPEN, max_seconds: float = MAX_SECONDS) -> None:
        self._runs: dict[UUID, Run] = {}
        self._lock = threading.Lock()
        self._max_open = max_open
        self._max_seconds = max_seconds

    def __len__(self) -> int:
        return len(self._runs)

    def __contains__(self, run_id: UUID) -> bool:
        return run_id in self._runs

    def get(self, run_id: UUID | None, default: "Run | None" = None) -> "Run | None":
        return default if run_id is None else self._runs.get(run_id, default)

    def add(self, run_id: UUID, run: "Run") -> None:
        """Hold `run` under its own id, or under the id of a run without a span, for which it stands in."""
        with self._lock:
            self._runs[run_id] = run
            given_up = [(stale, self._runs.pop(stale)) for stale in self._stale()]
        for stale, held in given_up:
            if held.run_id == stale:
                held.give_up()

    def pop(self, run_id: UUID) -> "Run | None":
        """Take a run out. None where it has no span of its own, or has ended before."""
        with self._lock:
            run = self._runs.pop(run_id, None)
        return run if run is not None and run.run_id == run_id else None

    def _stale(self) -> list[UUID]:
        """Ids to give up, oldest first: a dict keeps the order in which runs were added."""
        oldest_allowed = time.monotonic() - self._max_seconds
        excess = len(self._runs) - self._max_open
        stale: list[UUID] = []
        for run_id, run in self._runs.items():
            if len(stale) >= excess and run.started >= oldest_allowed:
                break
            stale.append(run_id)
        return stale


OPEN_RUNS = OpenRuns()
"""Shared by all handlers of the process: a run that two handlers hear of gets one span."""
