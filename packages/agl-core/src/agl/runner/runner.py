"""Runs an agent function for many rollouts concurrently, and records in the store how each ended."""

import contextlib
import contextvars
import logging
import os
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Self

import agl
from agl.errors import StoreError, TrainingError, TransitionError
from agl.runner.agent import Agent, AgentRun
from agl.store import AttemptState, Rollout, RolloutState, Store

logger = logging.getLogger(__name__)

_HEARTBEAT_S = 10.0
_FLUSH_AT_STOP_S = 5.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a rollout ended. `reward` and its `parts` are set if the runner has a reward function."""

    rollout_id: str
    state: RolloutState
    error: str | None = None
    answer: Any = None
    reward: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)


class Runner:
    """Runs `agent` (sync or async; it receives the task) for rollouts, each in its own daemon thread.

    `reward` and `reward_weights`: see `Agent`. If the agent or the reward function raises, or does not finish within
    `timeout_s`, the rollout fails; the runner raises nothing. With `concurrency` 1 the rollouts run one by one in the
    given order. Spans reach the store through the exporter of `agl.init()`.
    """

    def __init__(
        self,
        store: Store,
        agent: Callable[[Any], Any],
        *,
        reward: Callable[[Any, Any], Any] | None = None,
        reward_weights: Mapping[str, float] = MappingProxyType({}),
        concurrency: int = 32,
        timeout_s: float = 120.0,
    ) -> None:
        self.store = store
        self.agent = Agent(agent, reward, reward_weights)
        self.concurrency = concurrency
        self.timeout_s = timeout_s
        self.worker_id = f"{socket.gethostname()}-{os.getpid()}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, rollouts: Sequence[Rollout], *, on_done: Callable[[Outcome], None] = lambda outcome: None
    ) -> list[Outcome]:
        """Run `rollouts` and return their outcomes in the same order; `on_done` is called as each ends.

        On return all their spans are in the store. A rollout that has ended according to the store is not run again.
        Any exception, KeyboardInterrupt included, cancels the rollouts that have not ended and is re-raised. Raises
        StoreError for a rollout that another runner holds, TrainingError if spans did not reach the collector.
        """
        batch = _Batch(self, on_done)
        try:
            return batch.run(rollouts)
        except BaseException:
            batch.cancel()
            raise

    def close(self) -> None:
        self.agent.close()


class _Batch:
    """State of one `Runner.run`: waiting rollouts, running attempts and outcomes."""

    def __init__(self, runner: Runner, on_done: Callable[[Outcome], None]) -> None:
        self._runner = runner
        self._store = runner.store
        self._on_done = on_done
        self._waiting: deque[str] = deque()
        self._running: dict[str, AgentRun] = {}
        self._answered: dict[str, AgentRun] = {}
        self._ended: queue.SimpleQueue[AgentRun] = queue.SimpleQueue()
        self._outcomes: dict[str, Outcome] = {}
        self._next_heartbeat = time.monotonic() + _HEARTBEAT_S

    def run(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        self._store.enqueue_rollouts(rollouts)
        self._waiting.extend(dict.fromkeys(rollout.rollout_id for rollout in rollouts))
        while self._waiting or self._running:
            while self._waiting and len(self._running) < self._runner.concurrency:
                self._start_next()
            if self._running:
                self._wait()
            self._expire()
            self._heartbeat()
        self._settle()
        return [self._outcomes[rollout.rollout_id] for rollout in rollouts]

    def cancel(self) -> None:
        """Cancel every queued or running rollout of the batch; answered ones are kept if their spans arrive in time."""
        for run in self._running.values():
            run.abandon()
        self._store.cancel_rollouts([*self._waiting, *(run.rollout.rollout_id for run in self._running.values())])
        if agl.flush(_FLUSH_AT_STOP_S):
            self._finish_answered()
        self._store.cancel_rollouts([run.rollout.rollout_id for run in self._answered.values()])

    def _start_next(self) -> None:
        rollout_id = self._waiting[0]
        leased = self._store.lease_rollout(self._runner.worker_id, rollout_id)
        if leased is not None:
            self._start(AgentRun(*leased, deadline=time.monotonic() + self._runner.timeout_s))
        self._waiting.popleft()  # last, so that an interrupt before this line still cancels the rollout
        if leased is None:
            self._done(self._ended_before(rollout_id))

    def _start(self, run: AgentRun) -> None:
        self._running[run.attempt.attempt_id] = run
        in_context, name = contextvars.copy_context().run, f"agl {run.attempt.attempt_id}"
        # A daemon thread: an agent that never answers does not keep the process alive.
        threading.Thread(target=in_context, args=(self._execute, run), name=name, daemon=True).start()

    def _execute(self, run: AgentRun) -> None:
        self._runner.agent.execute(run)
        self._ended.put(run)

    def _ended_before(self, rollout_id: str) -> Outcome:
        """Outcome, from the store, of a rollout that cannot be leased because it has ended."""
        rollout, attempts = self._store.get_rollout(rollout_id), self._store.query_attempts(rollout_id)
        if rollout is None or rollout.state in (RolloutState.QUEUED, RolloutState.RUNNING):
            holder = attempts[-1].worker_id if attempts else "nobody"
            raise StoreError(
                f"rollout {rollout_id} is held by runner {holder} in {self._store.uri}; use new rollout ids, "
                "or cancel it (store.cancel_rollouts) if that runner is gone"
            )
        return Outcome(rollout_id, rollout.state, attempts[-1].error if attempts else None)

    def _wait(self) -> None:
        """Wait until a run ends, a deadline passes or a heartbeat is due; then handle all runs that have ended."""
        due = min([self._next_heartbeat, *(run.deadline for run in self._running.values())])
        with contextlib.suppress(queue.Empty):
            self._take(self._ended.get(timeout=max(0.0, due - time.monotonic())))
            while True:
                self._take(self._ended.get_nowait())

    def _take(self, run: AgentRun) -> None:
        if run.abandoned:
            return
        if run.error is not None:
            self._fail(run, AttemptState.FAILED, run.error)
            return
        self._answered[run.attempt.attempt_id] = self._running.pop(run.attempt.attempt_id)
        self._done(Outcome(run.rollout.rollout_id, RolloutState.SUCCEEDED, None, run.answer, run.reward, run.parts))

    def _expire(self) -> None:
        late = [run for run in self._running.values() if run.deadline <= time.monotonic()]
        for run in late:
            run.abandon()
            self._fail(run, AttemptState.TIMEOUT, f"no answer within {self._runner.timeout_s:g} s")
        if any(run.awaited is not None for run in late):
            self._runner.agent.renew_blocked_loop()

    def _fail(self, run: AgentRun, state: AttemptState, error: str) -> None:
        logger.warning("attempt %s: %s: %s", run.attempt.attempt_id, state, error)
        try:
            rollout = self._store.finish_attempt(run.attempt.attempt_id, state, error)
        except TransitionError:
            self._lose(run)
            return
        del self._running[run.attempt.attempt_id]
        if rollout.state is RolloutState.QUEUED:
            self._waiting.appendleft(rollout.rollout_id)
        else:
            self._done(Outcome(rollout.rollout_id, rollout.state, error))

    def _lose(self, run: AgentRun) -> None:
        """Give up an attempt that another process has ended; the rollout's state in the store decides."""
        logger.warning("attempt %s was ended in %s by another", run.attempt.attempt_id, self._store.uri)
        run.abandon()
        del self._running[run.attempt.attempt_id]
        self._waiting.appendleft(run.rollout.rollout_id)

    def _done(self, outcome: Outcome) -> None:
        self._outcomes[outcome.rollout_id] = outcome
        self._on_done(outcome)

    def _heartbeat(self) -> None:
        if time.monotonic() < self._next_heartbeat:
            return
        self._next_heartbeat = time.monotonic() + _HEARTBEAT_S
        for attempt_id in self._store.heartbeat([*self._running, *self._answered]):
            if run := self._running.get(attempt_id):
                self._lose(run)
        self._store.end_overdue_attempts()

    def _settle(self) -> None:
        """Mark answered rollouts as succeeded, after their spans have reached the store."""
        if not agl.flush():
            raise TrainingError(
                f"spans of {len(self._answered)} answered rollouts did not reach the collector; look at its log, and "
                "check that agl.init() names its address"
            )
        self._finish_answered()

    def _finish_answered(self) -> None:
        while self._answered:
            attempt_id, run = self._answered.popitem()
            rollout_id = run.rollout.rollout_id
            try:
                state = self._store.finish_attempt(attempt_id, AttemptState.SUCCEEDED).state
            except TransitionError:  # another process ended it after it answered
                state = self._ended_before(rollout_id).state
            self._outcomes[rollout_id] = replace(self._outcomes[rollout_id], state=state)
