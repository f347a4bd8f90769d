"""Runs an agent function for many rollouts concurrently, and records in the store how each ended."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Self

import agl
from agl.errors import StoreError, TrainingError, TransitionError
from agl.runner.agent import Agent, AgentRun
from agl.runner.execution import Execution, worker_id
from agl.store import AttemptState, Rollout, RolloutState, Store

_FLUSH_AT_STOP_S = 5.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a rollout ended. `reward` and its `parts`, or why it is `missing`, are set if there is a reward function."""

    rollout_id: str
    state: RolloutState
    error: str | None = None
    answer: Any = None
    reward: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    missing: str | None = None


class Runner:
    """Runs `agent` (sync or async; it receives the task) for rollouts, each in its own daemon thread.

    `reward` and `reward_weights`: see `Agent`. If the agent raises, or does not finish within `timeout_s`, the rollout
    fails; if the reward function does, the reward is missing. The runner raises nothing. With `concurrency` 1 the
    rollouts run one by one in the given order. Spans reach the store through the exporter of `agl.init()`.
    """

    def __init__(
        self,
        store: Store,
        agent: Callable[[Any], Any],
        *,
        reward: Callable[..., Any] | None = None,
        reward_weights: Mapping[str, float] = MappingProxyType({}),
        concurrency: int = 32,
        timeout_s: float = 120.0,
    ) -> None:
        self.store = store
        self.agent = Agent(agent, reward, reward_weights)
        self.concurrency = concurrency
        self.timeout_s = timeout_s

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


class _Batch(Execution):
    """State of one `Runner.run`: waiting rollouts, running attempts, answered ones, and outcomes."""

    def __init__(self, runner: Runner, on_done: Callable[[Outcome], None]) -> None:
        super().__init__(runner.store, runner.agent, runner.timeout_s)
        self._concurrency = runner.concurrency
        self._on_done = on_done
        self._waiting: deque[str] = deque()
        self._answers: dict[str, AgentRun] = {}
        self._outcomes: dict[str, Outcome] = {}

    def run(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        self._store.enqueue_rollouts(rollouts)
        self._waiting.extend(dict.fromkeys(rollout.rollout_id for rollout in rollouts))
        while self._waiting or self._running:
            while self._waiting and len(self._running) < self._concurrency:
                self._start_next()
            if self._running:
                self._wait()
            self._expire()
            self._beat([*self._answers])
        self._settle()
        return [self._outcomes[rollout.rollout_id] for rollout in rollouts]

    def cancel(self) -> None:
        """Cancel every queued or running rollout of the batch; answered ones are kept if their spans arrive in time."""
        for run in self._running.values():
            run.abandon()
        self._store.cancel_rollouts([*self._waiting, *(run.rollout.rollout_id for run in self._running.values())])
        if agl.flush(_FLUSH_AT_STOP_S):
            self._finish_answered()
        self._store.cancel_rollouts([run.rollout.rollout_id for run in self._answers.values()])

    def _start_next(self) -> None:
        rollout_id = self._waiting[0]
        leased = self._store.lease_rollout(worker_id(), rollout_id)
        if leased is not None:
            self._start(*leased)
        self._waiting.popleft()  # last, so that an interrupt before this line still cancels the rollout
        if leased is None:
            self._done(self._ended_before(rollout_id))

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

    def _answered(self, run: AgentRun) -> None:
        self._answers[run.attempt.attempt_id] = self._running.pop(run.attempt.attempt_id)
        score = run.score
        outcome = Outcome(run.rollout.rollout_id, RolloutState.SUCCEEDED, None, run.answer, score.value, score.parts)
        self._done(replace(outcome, missing=score.missing))

    def _failed(self, run: AgentRun, state: AttemptState, error: str) -> None:
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

    def _lost(self, run: AgentRun) -> None:
        """The rollout's state in the store decides."""
        del self._running[run.attempt.attempt_id]
        self._waiting.appendleft(run.rollout.rollout_id)

    def _done(self, outcome: Outcome) -> None:
        self._outcomes[outcome.rollout_id] = outcome
        self._on_done(outcome)

    def _settle(self) -> None:
        """Mark answered rollouts as succeeded, after their spans have reached the store."""
        if not agl.flush():
            raise TrainingError(
                f"spans of {len(self._answers)} answered rollouts did not reach the collector; look at its log, and "
                "check that agl.init() names its address"
            )
        self._finish_answered()

    def _finish_answered(self) -> None:
        while self._answers:
            attempt_id, run = self._answers.popitem()
            rollout_id = run.rollout.rollout_id
            try:
                state = self._store.finish_attempt(attempt_id, AttemptState.SUCCEEDED).state
            except TransitionError:  # another process ended it after it answered
                state = self._ended_before(rollout_id).state
            self._outcomes[rollout_id] = replace(self._outcomes[rollout_id], state=state)
