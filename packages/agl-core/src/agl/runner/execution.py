"""Attempts that run agents: their threads, deadlines and heartbeats."""

import contextlib
import contextvars
import logging
import os
import queue
import socket
import threading
import time
from abc import ABC, abstractmethod

from agl.runner.agent import Agent, AgentRun
from agl.store import Attempt, AttemptState, Rollout, Store

logger = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
"""Longest time between two heartbeats."""


class Execution(ABC):
    """Runs attempts, each in a daemon thread. One thread calls its methods.

    A subclass decides what each end means, and removes the run from those that run. So an interrupt finds each run in
    its place.
    """

    def __init__(self, store: Store, agent: Agent, timeout_s: float) -> None:
        self._store = store
        self._agent = agent
        self._timeout_s = timeout_s
        self._running: dict[str, AgentRun] = {}
        self._events: queue.SimpleQueue[AgentRun | None] = queue.SimpleQueue()
        """Runs that have ended; None only ends a wait."""
        self._next_heartbeat = time.monotonic() + HEARTBEAT_S

    @abstractmethod
    def _answered(self, run: AgentRun) -> None:
        """The agent has answered."""

    @abstractmethod
    def _failed(self, run: AgentRun, state: AttemptState, error: str) -> None:
        """The agent has failed, or is late and abandoned."""

    @abstractmethod
    def _lost(self, run: AgentRun) -> None:
        """Another process has ended the attempt, and the run is abandoned."""

    def _start(self, rollout: Rollout, attempt: Attempt) -> None:
        limit_s = min(self._timeout_s, rollout.timeout_s or self._timeout_s)
        run = AgentRun(rollout, attempt, limit_s)
        self._running[attempt.attempt_id] = run
        self._beat_within(run)
        in_context, name = contextvars.copy_context().run, f"agl {attempt.attempt_id}"
        # A daemon thread: an agent that never answers does not keep the process alive.
        threading.Thread(target=in_context, args=(self._execute, run), name=name, daemon=True).start()

    def _beat_within(self, run: AgentRun) -> None:
        """Let the next heartbeat come early enough for the limit of the rollout."""
        limit_s = run.rollout.unresponsive_s
        if limit_s is not None:
            self._next_heartbeat = min(self._next_heartbeat, time.monotonic() + limit_s / 3)

    def _execute(self, run: AgentRun) -> None:
        self._agent.execute(run)
        self._events.put(run)

    def _wait(self, at_most_s: float = HEARTBEAT_S) -> None:
        """Wait until a run ends, a deadline passes or a heartbeat is due; then handle all runs that have ended."""
        due = min([self._next_heartbeat, *(run.deadline for run in self._running.values())])
        with contextlib.suppress(queue.Empty):
            self._take(self._events.get(timeout=min(at_most_s, max(0.0, due - time.monotonic()))))
            while True:
                self._take(self._events.get_nowait())

    def _take(self, run: AgentRun | None) -> None:
        if run is None or run.abandoned:
            return
        if run.error is None:
            self._answered(run)
        else:
            self._report(run, AttemptState.FAILED, run.error)

    def _expire(self) -> None:
        late = [run for run in self._running.values() if run.is_late]
        for run in late:
            if run.answered:
                if run.is_late:  # it may have answered after the first look
                    run.miss_reward(f"no reward within {run.limit_s:g} s")
                    self._take(run)
                    run.abandon()
                continue
            run.abandon()
            self._report(run, AttemptState.TIMEOUT, f"no answer within {run.limit_s:g} s")
        if any(run.awaited is not None for run in late):
            self._agent.renew_blocked_loop()

    def _report(self, run: AgentRun, state: AttemptState, error: str) -> None:
        logger.warning("attempt %s: %s: %s", run.attempt.attempt_id, state, error)
        self._failed(run, state, error)

    def _beat(self, others: list[str]) -> None:
        """If a heartbeat is due, send that of the runs and of the attempts `others`, and act as a watchdog."""
        if time.monotonic() < self._next_heartbeat:
            return
        self._next_heartbeat = time.monotonic() + HEARTBEAT_S
        for run in self._running.values():
            self._beat_within(run)
        for attempt_id in self._store.heartbeat([*self._running, *others]):
            if run := self._running.get(attempt_id):
                self._lose(run)
        self._store.end_overdue_attempts()

    def _lose(self, run: AgentRun) -> None:
        logger.warning("attempt %s was ended in %s by another", run.attempt.attempt_id, self._store.uri)
        run.abandon()
        self._lost(run)


def worker_id() -> str:
    """The name of this process as a worker of rollouts."""
    return f"{socket.gethostname()}-{os.getpid()}"
