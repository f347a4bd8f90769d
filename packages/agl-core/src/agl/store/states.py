"""States of rollouts and attempts, and the transitions between them."""

from enum import StrEnum
from typing import TypeVar

from agl.errors import TransitionError


class RolloutState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_over(self) -> bool:
        return not ROLLOUT_TRANSITIONS[self]


class AttemptState(StrEnum):
    RUNNING = "running"
    UNRESPONSIVE = "unresponsive"
    """No span and no heartbeat for too long; its worker may still run."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    RELEASED = "released"
    """Given back by its worker, which stops: the rollout is queued again, and the attempt does not count."""


ROLLOUT_TRANSITIONS: dict[RolloutState, frozenset[RolloutState]] = {
    RolloutState.QUEUED: frozenset({RolloutState.RUNNING, RolloutState.CANCELLED}),
    # Back to QUEUED is the retry of a failed attempt.
    RolloutState.RUNNING: frozenset(RolloutState) - {RolloutState.RUNNING},
    RolloutState.SUCCEEDED: frozenset(),
    RolloutState.FAILED: frozenset(),
    RolloutState.CANCELLED: frozenset(),
}

ENDS = (AttemptState.SUCCEEDED, AttemptState.FAILED, AttemptState.TIMEOUT, AttemptState.RELEASED)
"""Ends that the worker of an attempt may report."""

ATTEMPT_TRANSITIONS: dict[AttemptState, frozenset[AttemptState]] = {
    AttemptState.RUNNING: frozenset({*ENDS, AttemptState.UNRESPONSIVE, AttemptState.CANCELLED}),
    AttemptState.UNRESPONSIVE: frozenset({AttemptState.RUNNING, AttemptState.CANCELLED}),
    # The worker may still report the end; the rollout stays cancelled.
    AttemptState.CANCELLED: frozenset(ENDS),
    AttemptState.SUCCEEDED: frozenset(),
    AttemptState.FAILED: frozenset(),
    AttemptState.TIMEOUT: frozenset(),
    AttemptState.RELEASED: frozenset(),
}

State = TypeVar("State", RolloutState, AttemptState)


def move(table: dict[State, frozenset[State]], current: State, target: State, name: str) -> State:
    """`target` if `table` allows it after `current`, else raises TransitionError that begins with `name`."""
    if target not in table[current]:
        allowed = ", ".join(sorted(table[current])) or "nothing: it is final"
        raise TransitionError(f"{name} is {current} and cannot become {target}; from {current} it may become {allowed}")
    return target
