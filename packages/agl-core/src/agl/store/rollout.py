"""Rollouts and their attempts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from agl.errors import InputError
from agl.store.states import AttemptState, RolloutState

RETRYABLE: Final = frozenset({AttemptState.FAILED, AttemptState.TIMEOUT, AttemptState.UNRESPONSIVE})


@dataclass(frozen=True, slots=True)
class Rollout:
    """An execution of an agent on one input. Raises InputError for limits that make no sense.

    The store sets `state`, `attempts` and `ended_ns`: a rollout that is enqueued starts as QUEUED whatever they are.
    """

    rollout_id: str
    input: Any
    """Any JSON value: the task that the agent receives."""
    group_id: str | None = None
    mode: str = "train"
    max_attempts: int = 1
    """Grows by one with each attempt that its worker gives back."""
    retry_on: frozenset[AttemptState] = RETRYABLE
    """Ends of an attempt after which the rollout gets another one, up to `max_attempts`."""
    timeout_s: float | None = None
    """An attempt that runs for longer is ended as TIMEOUT. None: no limit."""
    unresponsive_s: float | None = None
    """An attempt without a span or heartbeat for longer is ended as UNRESPONSIVE. None: no limit. Spans count
    to a tenth of it: one that follows another sooner need not be noticed."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Any JSON object; the gateway reads its `seed`, `agl rollouts` its `run`, the training that it is of."""
    state: RolloutState = RolloutState.QUEUED
    attempts: int = 0
    """Number of attempts begun."""
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

    @property
    def seed(self) -> int | None:
        """Seed of the sampling of its calls, if `metadata` has an integer `seed`."""
        seed = self.metadata.get("seed")
        return seed if isinstance(seed, int) else None


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
    """Arrival of its last heartbeat or span, by the clock of the store."""
    ended_ns: int | None = None
    error: str | None = None
