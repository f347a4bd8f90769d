"""Runs any queued rollout of a store, one after another, until it is stopped."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import agl
from agl.errors import RefusedError, RunnerError, StoreError, TransitionError, UnknownIdError
from agl.runner.agent import Agent, AgentRun
from agl.runner.execution import HEARTBEAT_S, Execution, worker_id
from agl.store import AttemptState, Store

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.05, 0.5
"""Pauses before an empty queue is looked at again; they double."""


@dataclass(frozen=True, slots=True)
class End:
    """How an attempt ended, to be reported once its spans are in the store."""

    attempt_id: str
    state: AttemptState
    error: str | None = None


class Patience:
    """How long a service may be away before the runner gives up."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since: float | None = None

    def lost(self, what: str) -> None:
        """Raises RunnerError if the service has been away for the limit."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
            logger.warning("%s; trying again for %g s", what, self._limit_s)
        if now - self._since >= self._limit_s:
            raise RunnerError(
                f"{what}, for {self._limit_s:g} s. The runner ends; another one runs the rollouts that it held, once "
                "their limits (unresponsive_s) are over. Start it again when `agl serve` or the training runs"
            )

    def found(self) -> None:
        self._since = None


class QueueWorker(Execution):
    """Leases rollouts from `store`, those of `run` only unless it is None, and runs them with `agent`.

    An attempt ends in the store once its spans are there; one whose spans are lost is given back, so that it runs
    again. After `stop` no rollout is leased, and what has not ended within `drain_s` is given back. Without store or
    collector for `patience_s` the worker raises RunnerError.
    """

    def __init__(
        self,
        store: Store,
        agent: Agent,
        *,
        run: str | None,
        concurrency: int,
        timeout_s: float,
        drain_s: float,
        patience_s: float,
    ) -> None:
        super().__init__(store, agent, timeout_s)
        self._run = run
        self._concurrency = concurrency
        self._drain_s = drain_s
        self._patience_s = patience_s
        self._store_patience, self._span_patience = Patience(patience_s), Patience(patience_s)
        self._is_stopped = False
        self._pause_s = _FIRST_PAUSE_S
        self._new: list[End] = []
        """Ends whose spans are not known to be in the store."""
        self._flushing: list[End] = []
        self._flushed: bool | None = None
        """Result of the flush for `_flushing`; None while it runs."""
        self._reports: list[End] = []
        """Ends to report."""
        self._incomplete: set[str] = set()
        """Attempts that were running when spans were lost."""
        self.ended: Counter[AttemptState] = Counter()
        """Number of attempts that ended in each state."""

    def stop(self) -> None:
        """Stop leasing; a second call gives back at once what still runs. For signal handlers, too."""
        if self._is_stopped:
            self._drain_s = 0.0
        self._is_stopped = True
        self._events.put(None)

    def work(self) -> None:
        """Until `stop`. Raises RunnerError if the store or the collector is away for too long."""
        while not self._is_stopped:
            self._lease()
            self._turn()
        stopped = time.monotonic()
        while self._running and time.monotonic() - stopped < self._drain_s:
            self._turn()
        for run in [*self._running.values()]:
            run.abandon()
            self._end(run, AttemptState.RELEASED, None)
        while self._new or self._flushing or self._reports:
            self._turn()

    def _turn(self) -> None:
        is_full = len(self._running) >= self._concurrency and not self._is_stopped
        self._wait(HEARTBEAT_S if is_full else self._pause_s)
        self._expire()
        self._flush()
        self._reach_store(self._send)

    def _lease(self) -> None:
        def lease() -> None:
            while len(self._running) < self._concurrency and not self._is_stopped:
                leased = self._store.lease_rollout(worker_id(), run=self._run)
                if leased is None:
                    self._pause_s = min(2 * self._pause_s, _MAX_PAUSE_S)
                    return
                self._pause_s = _FIRST_PAUSE_S
                self._start(*leased)

        self._reach_store(lease)

    def _reach_store(self, work: Callable[[], None]) -> None:
        """Do `work`, which may be repeated. While the store is away, agents go on running."""
        try:
            work()
        except RefusedError:
            raise
        except StoreError as error:
            self._store_patience.lost(f"the store does not answer ({error})")
            time.sleep(_MAX_PAUSE_S)
        else:
            self._store_patience.found()

    def _send(self) -> None:
        waiting = [end.attempt_id for end in (*self._new, *self._flushing, *self._reports)]
        self._beat(waiting)
        while self._reports:
            end = self._reports[0]
            try:
                self._store.finish_attempt(end.attempt_id, end.state, end.error)
                self.ended[end.state] += 1
            except (TransitionError, UnknownIdError) as error:
                logger.warning("attempt %s was ended by another: %s", end.attempt_id, error)
            del self._reports[0]

    def _flush(self) -> None:
        """Send spans in a thread of its own, because it may wait for a slow collector while heartbeats are due."""
        if self._flushing and self._flushed is None:
            return
        if self._flushing and not self._flushed:
            self._span_patience.lost(f"the collector did not take the spans of {len(self._flushing)} rollouts")
            self._incomplete |= self._running.keys()
            self._flushing = [End(end.attempt_id, AttemptState.RELEASED) for end in self._flushing]
        elif self._flushing:
            self._span_patience.found()
        self._reports += self._flushing
        self._flushing, self._new, self._flushed = self._new, [], None
        if self._flushing:
            threading.Thread(target=self._flush_now, name="agl flush", daemon=True).start()

    def _flush_now(self) -> None:
        self._flushed = agl.flush(HEARTBEAT_S if self._is_stopped else max(HEARTBEAT_S, self._patience_s))
        self._events.put(None)

    def _answered(self, run: AgentRun) -> None:
        self._end(run, AttemptState.SUCCEEDED, None)

    def _failed(self, run: AgentRun, state: AttemptState, error: str) -> None:
        self._end(run, state, error)

    def _end(self, run: AgentRun, state: AttemptState, error: str | None) -> None:
        attempt_id = run.attempt.attempt_id
        del self._running[attempt_id]
        if attempt_id in self._incomplete:
            self._incomplete.remove(attempt_id)
            state, error = AttemptState.RELEASED, None
        self._new.append(End(attempt_id, state, error))

    def _lost(self, run: AgentRun) -> None:
        """Nothing is left to report: another runner has the rollout, or it is cancelled."""
        del self._running[run.attempt.attempt_id]
