"""How events change a rollout and its attempt: pure functions, used by every store.

A store reads the rollout and the attempt, calls one of these functions, and saves the result, all in one transaction.
Between transactions: at most one attempt of a rollout runs; it is the last one, and then the rollout runs as well. A
rollout that has ended never runs again, because a caller may have waited for that end.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from agl.errors import TransitionError
from agl.store.rollout import Attempt, Rollout
from agl.store.states import ATTEMPT_TRANSITIONS, ENDS, ROLLOUT_TRANSITIONS, AttemptState, RolloutState, move

_HEARTBEAT_INTERVAL_NS: Final = 100_000_000
"""A heartbeat this soon after the last one is not saved."""

_LONGEST_INTERVAL_S: Final = 10.0
_MAX_ATTEMPTS: Final = 100_000

Pair = tuple[Rollout, Attempt]


class SpanHeartbeats:
    """For how long the spans of each attempt need not save another heartbeat, as this process knows.

    A span is a heartbeat. With many attempts at once every batch has spans of most of them, and to save a heartbeat
    costs more than a span: one in a tenth of the rollout's `unresponsive_s` is enough.
    """

    def __init__(self) -> None:
        self._until_ns: dict[str, int] = {}

    def due(self, attempt_ids: Iterable[str], now_ns: int) -> list[str]:
        """Those of which a span at `now_ns` has to save a heartbeat."""
        return [name for name in attempt_ids if self._until_ns.get(name, 0) <= now_ns]

    def saved(self, rollout: Rollout, attempt_id: str, now_ns: int) -> None:
        if len(self._until_ns) >= _MAX_ATTEMPTS:  # Each then saves one heartbeat more.
            self._until_ns.clear()
        limit_s = math.inf if rollout.unresponsive_s is None else rollout.unresponsive_s
        interval_ns = int(min(limit_s / 10, _LONGEST_INTERVAL_S) * 1e9)
        self._until_ns[attempt_id] = now_ns + interval_ns


def is_fresh(attempt: Attempt, now_ns: int) -> bool:
    """Whether the attempt runs and its last heartbeat is so recent that a new one need not be saved."""
    return attempt.state is AttemptState.RUNNING and now_ns - attempt.heartbeat_ns < _HEARTBEAT_INTERVAL_NS


def begin(rollout: Rollout, worker_id: str, now_ns: int) -> Pair:
    """Begin the next attempt of a queued rollout. Raises TransitionError if it is not queued."""
    number = rollout.attempts + 1
    attempt_id = f"{rollout.rollout_id}-a{number}"
    attempt = Attempt(attempt_id, rollout.rollout_id, number, worker_id, AttemptState.RUNNING, now_ns, now_ns)
    return replace(_move(rollout, RolloutState.RUNNING, now_ns), attempts=number), attempt


def heartbeat(rollout: Rollout, attempt: Attempt, now_ns: int) -> Pair | None:
    """Both after a heartbeat or a span of `attempt`; None if the attempt is over.

    An UNRESPONSIVE attempt runs again only while its rollout is queued for the next attempt. Later, two attempts would
    run at once, or the rollout has ended and a caller may know of that end.
    """
    may_run_again = rollout.state is RolloutState.QUEUED and attempt.number == rollout.attempts
    if attempt.state is AttemptState.UNRESPONSIVE and may_run_again:
        rollout = _move(rollout, RolloutState.RUNNING, now_ns)
        attempt = replace(_to(attempt, AttemptState.RUNNING), ended_ns=None, error=None)
    if attempt.state is not AttemptState.RUNNING:
        return None
    return rollout, replace(attempt, heartbeat_ns=max(now_ns, attempt.heartbeat_ns))


def finish(rollout: Rollout, attempt: Attempt, state: AttemptState, error: str | None, now_ns: int) -> Pair:
    """Both after the worker of `attempt` has reported its end.

    The rollout succeeds, fails, or is queued again if it has attempts left or the attempt was given back; a cancelled
    one stays cancelled. Raises TransitionError if the attempt is over or `state` is not one of ENDS.
    """
    if state not in ENDS:
        raise TransitionError(f"attempt {attempt.attempt_id} cannot be finished as {state}, but as {', '.join(ENDS)}")
    return _end(*(heartbeat(rollout, attempt, now_ns) or (rollout, attempt)), state, error, now_ns)


def expire(rollout: Rollout, attempt: Attempt, now_ns: int) -> Pair | None:
    """Both after the watchdog has ended a running attempt; None if it is within the limits of its rollout."""
    age_s, silent_s = (now_ns - attempt.started_ns) / 1e9, (now_ns - attempt.heartbeat_ns) / 1e9
    if rollout.timeout_s is not None and age_s > rollout.timeout_s:
        return _end(rollout, attempt, AttemptState.TIMEOUT, f"not ended within {rollout.timeout_s:g} s", now_ns)
    if rollout.unresponsive_s is not None and silent_s > rollout.unresponsive_s:
        error = f"no span and no heartbeat for {rollout.unresponsive_s:g} s"
        return _end(rollout, attempt, AttemptState.UNRESPONSIVE, error, now_ns)
    return None


def cancel(rollout: Rollout, attempt: Attempt | None, now_ns: int) -> tuple[Rollout, Attempt | None]:
    """Both after the rollout is cancelled; `attempt` is its last. Both stay as they are if the rollout is over."""
    if rollout.state.is_over:
        return rollout, attempt
    if attempt is not None and AttemptState.CANCELLED in ATTEMPT_TRANSITIONS[attempt.state]:
        attempt = replace(_to(attempt, AttemptState.CANCELLED), ended_ns=now_ns)
    return _move(rollout, RolloutState.CANCELLED, now_ns), attempt


def _end(rollout: Rollout, attempt: Attempt, state: AttemptState, error: str | None, now_ns: int) -> Pair:
    attempt = replace(_to(attempt, state), ended_ns=now_ns, error=error)
    if rollout.state is RolloutState.CANCELLED:
        return rollout, attempt
    if state is AttemptState.RELEASED:
        rollout = replace(rollout, max_attempts=rollout.max_attempts + 1)
    return _move(rollout, _next_state(rollout, state), now_ns), attempt


def _next_state(rollout: Rollout, end: AttemptState) -> RolloutState:
    """State of a rollout after its last attempt ended as `end`."""
    if end is AttemptState.SUCCEEDED:
        return RolloutState.SUCCEEDED
    is_retried = end in {*rollout.retry_on, AttemptState.RELEASED} and rollout.attempts < rollout.max_attempts
    return RolloutState.QUEUED if is_retried else RolloutState.FAILED


def _move(rollout: Rollout, target: RolloutState, now_ns: int) -> Rollout:
    state = move(ROLLOUT_TRANSITIONS, rollout.state, target, f"rollout {rollout.rollout_id}")
    return replace(rollout, state=state, ended_ns=now_ns if state.is_over else None)


def _to(attempt: Attempt, target: AttemptState) -> Attempt:
    return replace(attempt, state=move(ATTEMPT_TRANSITIONS, attempt.state, target, f"attempt {attempt.attempt_id}"))
