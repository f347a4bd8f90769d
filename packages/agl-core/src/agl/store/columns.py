"""Rollouts, attempts and resources as rows of an SQL database."""

import json
from collections.abc import Sequence
from typing import Any, Final

from agl.errors import InputError
from agl.store.protocol import Resource
from agl.store.rollout import Attempt, Rollout
from agl.store.states import AttemptState, RolloutState

ROLLOUT_COLUMNS: Final = (
    "rollout_id, input, group_id, mode, max_attempts, retry_on, timeout_s, unresponsive_s, metadata,"
    " state, attempts, ended_ns"
)
ATTEMPT_COLUMNS: Final = "attempt_id, rollout_id, number, worker_id, state, started_ns, heartbeat_ns, ended_ns, error"
RESOURCE_COLUMNS: Final = "name, version, uri, metadata"

BEAT_EVERY_NS: Final = 100_000_000
"""A heartbeat that came this shortly after the last is not worth writing."""


def is_fresh(attempt: Attempt, now_ns: int) -> bool:
    """Whether a sign of life changes nothing that is worth writing."""
    return attempt.state is AttemptState.RUNNING and now_ns - attempt.heartbeat_ns < BEAT_EVERY_NS


def to_row(rollout: Rollout) -> tuple[Any, ...]:
    """`ROLLOUT_COLUMNS` of a rollout to queue. Raises InputError naming it where its input is not a JSON value."""
    return (
        rollout.rollout_id,
        to_json(rollout.input, f"the input of rollout {rollout.rollout_id}"),
        rollout.group_id,
        rollout.mode,
        rollout.max_attempts,
        " ".join(sorted(rollout.retry_on)),
        rollout.timeout_s,
        rollout.unresponsive_s,
        to_json(rollout.metadata, f"the metadata of rollout {rollout.rollout_id}"),
        RolloutState.QUEUED,
        0,
        None,
    )


def to_rollout(row: Sequence[Any]) -> Rollout:
    rollout_id, task, group_id, mode, max_attempts, retry_on, timeout_s, unresponsive_s, metadata, *own = row
    state, attempts, ended_ns = own
    return Rollout(
        rollout_id,
        json.loads(task),
        group_id,
        mode,
        max_attempts,
        frozenset(map(AttemptState, retry_on.split())),
        timeout_s,
        unresponsive_s,
        json.loads(metadata),
        RolloutState(state),
        attempts,
        ended_ns,
    )


def to_attempt(row: Sequence[Any]) -> Attempt:
    attempt_id, rollout_id, number, worker_id, state, *rest = row
    return Attempt(attempt_id, rollout_id, number, worker_id, AttemptState(state), *rest)


def to_resource_row(resource: Resource) -> tuple[Any, ...]:
    """`RESOURCE_COLUMNS` of a resource. Raises InputError naming it where its metadata is not a JSON value."""
    metadata = to_json(resource.metadata, f"the metadata of {resource.name}@{resource.version}")
    return (resource.name, resource.version, resource.uri, metadata)


def to_resource(row: Sequence[Any]) -> Resource:
    name, version, uri, metadata = row
    return Resource(name, version, uri, json.loads(metadata))


def to_json(value: Any, what: str) -> str:
    """`value` as JSON. Raises InputError naming `what` where it is none."""
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{what} is not a JSON value: {error}") from error
