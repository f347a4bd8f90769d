"""Rollouts and their attempts, and what each event makes of them: pure functions of both, for every store.

A store loads the rollout and the attempt, asks, and keeps the answer, all in one transaction. What holds between
transactions: at most one attempt of a rollout runs, it is the rollout's last, and then the rollout runs as well; the
end of a rollout is never taken back, for somebody may have waited for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from agl.errors import InputError, TransitionError
from agl.store.states import ATTEMPT_TRANSITIONS, ENDS, ROLLOUT_TRANSITIONS, AttemptState, RolloutState, move

RETRYABLE: Final = frozenset({AttemptState.FAILED, AttemptState.TIMEOUT, AttemptState.UNRESPONSIVE})


@dataclass(frozen=True, slots=True)
class Rollout:
    """An execution of an agent on one input. Raises InputError for limits that no rollout can have.

    `state`, `attempts` and `ended_ns` are the store's: what is queued begins as QUEUED whatever they say.
    """

    rollout_id: str
    input: Any
    """Any JSON value: the task that the agent receives."""
    group_id: str | None = None
    mode: str = "train"
    max_attempts: int = 1
    retry_on: frozenset[AttemptState] = RETRYABLE
    """How an attempt must have ended for another to follow, as long as there are fewer than `max_attempts`."""
    timeout_s: float | None = None
    """An attempt that runs for longer is ended as TIMEOUT. None: no limit."""
    unresponsive_s: float | None = None
    """An attempt silent for longer (no span, no heartbeat) is taken for UNRESPONSIVE. None: no limit."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    state: RolloutState = RolloutState.QUEUED
    attempts: int = 0
    """Attempts made so far."""
    ended_ns: int | None = None

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise InputError(f"rollout {self.rollout_id} may have {self.max_attempts} attempts, expected 1 or more")
        if not self.retry_on <= RETRYABLE:
            known = ", ".join(sorted(RETRYABLE))
            raise InputError(f"rollout {self.rollout_id} retries on {set(self.retry_on)}, expected any of {known}")
        for name, limit in (("timeout_s", self.timeout_s), ("unresponsive_s", self.unresponsive_s)):
            if limit is not None and not limit > 0:
                raise InputError(f"rollout {self.rollout_id} has {name} {limit:g}, expected more than 0 or None")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of a rollout. `attempt_id` is `<rollout_id>-a<number>`, `number` counts from 1."""

    attempt_id: str
    rollout_id: str
    number: int
    worker_id: str
    state: AttemptState
    started_ns: int
    heartbeat_ns: int
    """When its last heartbeat or span arrived, by the clock of the store."""
    ended_ns: int | None = None
    error: str | None = None


Pair = tuple[Rollout, Attempt]


def begin(rollout: Rollout, worker_id: str, now_ns: int) -> Pair:
    """The next attempt of a queued rollout. Raises TransitionError where it is not queued."""
    number = rollout.attempts + 1
    attempt_id = f"{rollout.rollout_id}-a{number}"
    attempt = Attempt(attempt_id, rollout.rollout_id, number, worker_id, AttemptState.RUNNING, now_ns, now_ns)
    return replace(_move(rollout, RolloutState.RUNNING, now_ns), attempts=number), attempt


def beat(rollout: Rollout, attempt: Attempt, now_ns: int) -> Pair | None:
    """Both after a sign of life of `attempt`; None where it is over.

    It revives an attempt that was taken for unresponsive only as long as its rollout waits for the next attempt: once
    that has begun two would run at once, and once the rollout has ended somebody may have been told.
    """
    if attempt.state is AttemptState.UNRESPONSIVE and _may_revive(rollout, attempt):
        rollout = _move(rollout, RolloutState.RUNNING, now_ns)
        attempt = replace(_to(attempt, AttemptState.RUNNING), ended_ns=None, error=None)
    if attempt.state is not AttemptState.RUNNING:
        return None
    return rollout, replace(attempt, heartbeat_ns=max(now_ns, attempt.heartbeat_ns))


def finish(rollout: Rollout, attempt: Attempt, state: AttemptState, error: str | None, now_ns: int) -> Pair:
    """Both once the worker of `attempt` says how it ended. Raises TransitionError where it is over, or for no end.

    The rollout succeeds, fails, or is queued again while tries are left; a cancelled one stays cancelled.
    """
    if state not in ENDS:
        raise TransitionError(f"attempt {attempt.attempt_id} cannot be finished as {state}, but as {', '.join(ENDS)}")
    return _end(*(beat(rollout, attempt, now_ns) or (rollout, attempt)), state, error, now_ns)


def expire(rollout: Rollout, attempt: Attempt, now_ns: int) -> Pair | None:
    """Both once the watchdog has ended a running attempt; None while it is within the limits of its rollout."""
    age_s, silent_s = (now_ns - attempt.started_ns) / 1e9, (now_ns - attempt.heartbeat_ns) / 1e9
    if rollout.timeout_s is not None and age_s > rollout.timeout_s:
        return _end(rollout, attempt, AttemptState.TIMEOUT, f"not ended within {rollout.timeout_s:g} s", now_ns)
    if rollout.unresponsive_s is not None and silent_s > rollout.unresponsive_s:
        error = f"no span and no heartbeat for {rollout.unresponsive_s:g} s"
        return _end(rollout, attempt, AttemptState.UNRESPONSIVE, error, now_ns)
    return None


def cancel(rollout: Rollout, attempt: Attempt | None, now_ns: int) -> tuple[Rollout, Attempt | None]:
    """Both once the rollout is cancelled; `attempt` is its last. What is over stays as it is."""
    if rollout.state.is_over:
        return rollout, attempt
    if attempt is not None and AttemptState.CANCELLED in ATTEMPT_TRANSITIONS[attempt.state]:
        attempt = replace(_to(attempt, AttemptState.CANCELLED), ended_ns=now_ns)
    return _move(rollout, RolloutState.CANCELLED, now_ns), attempt


def _may_revive(rollout: Rollout, attempt: Attempt) -> bool:
    return rollout.state is RolloutState.QUEUED and attempt.number == rollout.attempts


def _end(rollout: Rollout, attempt: Attempt, state: AttemptState, error: str | None, now_ns: int) -> Pair:
    attempt = replace(_to(attempt, state), ended_ns=now_ns, error=error)
    if rollout.state is RolloutState.CANCELLED:
        return rollout, attempt
    return _move(rollout, _after(rollout, state), now_ns), attempt


def _after(rollout: Rollout, attempt: AttemptState) -> RolloutState:
    """State of a rollout once its last attempt ended as `attempt`."""
    if attempt is AttemptState.SUCCEEDED:
        return RolloutState.SUCCEEDED
    again = attempt in rollout.retry_on and rollout.attempts < rollout.max_attempts
    return RolloutState.QUEUED if again else RolloutState.FAILED


def _move(rollout: Rollout, target: RolloutState, now_ns: int) -> Rollout:
    state = move(ROLLOUT_TRANSITIONS, rollout.state, target, f"rollout {rollout.rollout_id}")
    return replace(rollout, state=state, ended_ns=now_ns if state.is_over else None)


def _to(attempt: Attempt, target: AttemptState) -> Attempt:
    return replace(attempt, state=move(ATTEMPT_TRANSITIONS, attempt.state, target, f"attempt {attempt.attempt_id}"))
