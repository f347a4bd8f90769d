"""What every store can do. The verbs are synchronous and thread-safe; async callers use `asyncio.to_thread`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from agl.span import Span
from agl.store.states import AttemptState, RolloutState


@dataclass(frozen=True, slots=True)
class Rollout:
    """An execution of an agent on one input. `input` is any JSON value: the task the agent receives."""

    rollout_id: str
    input: Any
    group_id: str | None = None
    mode: str = "train"
    max_attempts: int = 1
    state: RolloutState = RolloutState.QUEUED
    metadata: Mapping[str, Any] = field(default_factory=dict)


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
    ended_ns: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Resource:
    """A versioned thing that the loop produces, e.g. the adapter folder of a role. Versions of a name count from 0."""

    name: str
    version: int
    uri: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Store(Protocol):
    """Durable home of spans, rollouts, resources and metrics.

    A verb that changes something returns only after the change is committed.
    """

    uri: str

    def append_spans(self, spans: Sequence[Span]) -> int:
        """Keep `spans`; one already kept (same trace id and span id) is left as it is. Returns how many were new."""
        ...

    def query_spans(self, rollout_id: str) -> list[Span]:
        """Spans of a rollout by start time: those that name it, and those of its traces that name no rollout."""
        ...

    def count_spans(self) -> int: ...

    def last_rollout_id(self) -> str | None:
        """Rollout of the span that arrived last and names a rollout; else of the span that arrived last."""
        ...

    def enqueue_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        """Queue `rollouts`; an id that is already known is left as it is, so a caller may repeat itself."""
        ...

    def lease_rollout(self, worker_id: str, rollout_id: str | None = None) -> tuple[Rollout, Attempt] | None:
        """The oldest queued rollout with a new attempt, now running; None when the queue is empty. Never blocks.

        With `rollout_id` that one alone: a runner takes its own and leaves what others queued.
        """
        ...

    def heartbeat(self, attempt_id: str) -> None: ...

    def finish_attempt(self, attempt_id: str, state: AttemptState, error: str | None = None) -> Rollout:
        """End an attempt; its rollout succeeds, fails, or is queued again while tries are left."""
        ...

    def cancel_rollouts(self, rollout_ids: Sequence[str]) -> None: ...

    def requeue_stale(self, silent_for_ns: int) -> list[str]:
        """End running attempts whose last heartbeat is older as `timeout`; returns their attempt ids."""
        ...

    def get_rollout(self, rollout_id: str) -> Rollout | None: ...

    def query_rollouts(self, group_id: str) -> list[Rollout]: ...

    def query_attempts(self, rollout_id: str) -> list[Attempt]: ...

    def put_resource(self, resource: Resource) -> None:
        """Keep a resource; the same name and version again replaces it (a resumed run repeats its last step)."""
        ...

    def get_resource(self, name: str, version: int | None = None) -> Resource | None:
        """A version of a resource, the newest by default."""
        ...

    def append_metrics(self, run: str, step: int, metrics: Mapping[str, float]) -> None:
        """Keep metrics of a step; the same run, step and name again replaces the value."""
        ...

    def query_metrics(self, run: str) -> dict[str, list[tuple[int, float]]]:
        """Metric name to its (step, value) pairs by step."""
        ...

    def close(self) -> None: ...
