"""The state tables of rollouts and attempts. Pure data and pure functions; stores only ask them."""

from enum import StrEnum
from typing import TypeVar

from agl.errors import StoreError


class RolloutState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class AttemptState(StrEnum):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMEOUT = "timeout"


ROLLOUT_TRANSITIONS: dict[RolloutState, frozenset[RolloutState]] = {
    RolloutState.QUEUED: frozenset({RolloutState.RUNNING, RolloutState.CANCELLED}),
    # Back to QUEUED is the retry of a failed attempt.
    RolloutState.RUNNING: frozenset(
        {RolloutState.SUCCEEDED, RolloutState.FAILED, RolloutState.CANCELLED, RolloutState.QUEUED}
    ),
    RolloutState.SUCCEEDED: frozenset(),
    RolloutState.FAILED: frozenset(),
    RolloutState.CANCELLED: frozenset(),
}

ATTEMPT_TRANSITIONS: dict[AttemptState, frozenset[AttemptState]] = {
    AttemptState.RUNNING: frozenset({AttemptState.SUCCEEDED, AttemptState.FAILED, AttemptState.TIMEOUT}),
    AttemptState.SUCCEEDED: frozenset(),
    AttemptState.FAILED: frozenset(),
    AttemptState.TIMEOUT: frozenset(),
}

State = TypeVar("State", RolloutState, AttemptState)


def move(table: dict[State, frozenset[State]], current: State, target: State, name: str) -> State:
    """`target`, if `table` allows it after `current`; raises StoreError naming `name` otherwise."""
    if target not in table[current]:
        allowed = ", ".join(sorted(table[current])) or "nothing: it is final"
        raise StoreError(f"{name} is {current} and cannot become {target}; from {current} it may become {allowed}")
    return target


def after_attempt(attempt: AttemptState, number: int, max_attempts: int) -> RolloutState:
    """State of a rollout once its attempt `number` (from 1) ended as `attempt`."""
    if attempt is AttemptState.SUCCEEDED:
        return RolloutState.SUCCEEDED
    return RolloutState.QUEUED if number < max_attempts else RolloutState.FAILED
