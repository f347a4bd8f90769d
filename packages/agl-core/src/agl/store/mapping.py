"""Rollouts, attempts and resources as database rows, and back. Structured values are JSON text."""

import json
import re
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


def from_rollout(rollout: Rollout) -> tuple[Any, ...]:
    """`ROLLOUT_COLUMNS` of a rollout to enqueue. Raises InputError, with its id, if its input is not a JSON value."""
    task = to_json(rollout.input, f"the input of rollout {rollout.rollout_id}")
    metadata = to_json(rollout.metadata, f"the metadata of rollout {rollout.rollout_id}")
    limits = (rollout.max_attempts, " ".join(sorted(rollout.retry_on)), rollout.timeout_s, rollout.unresponsive_s)
    return (rollout.rollout_id, task, rollout.group_id, rollout.mode, *limits, metadata, RolloutState.QUEUED, 0, None)


def to_rollout(row: Sequence[Any]) -> Rollout:
    rollout_id, task, group_id, mode, max_attempts, retry_on, timeout_s, unresponsive_s, metadata, *progress = row
    limits = (max_attempts, frozenset(map(AttemptState, retry_on.split())), timeout_s, unresponsive_s)
    values = (rollout_id, json.loads(task), group_id, mode, *limits, json.loads(metadata))
    state, attempts, ended_ns = progress
    return Rollout(*values, RolloutState(state), attempts, ended_ns)


def to_attempt(row: Sequence[Any]) -> Attempt:
    attempt_id, rollout_id, number, worker_id, state, *rest = row
    return Attempt(attempt_id, rollout_id, number, worker_id, AttemptState(state), *rest)


def from_resource(resource: Resource) -> tuple[Any, ...]:
    """`RESOURCE_COLUMNS` of a resource. Raises InputError, with its name, if its metadata is not a JSON value."""
    metadata = to_json(resource.metadata, f"the metadata of {resource.name}@{resource.version}")
    return (resource.name, resource.version, resource.uri, metadata)


def to_resource(row: Sequence[Any]) -> Resource:
    name, version, uri, metadata = row
    return Resource(name, version, uri, json.loads(metadata))


def to_json(value: Any, description: str) -> str:
    """`value` as JSON. Raises InputError that begins with `description` if it is not a JSON value."""
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{description} is not a JSON value: {error}") from error


def read_cursor(cursor: str, numbers: int) -> tuple[int, ...]:
    """The numbers of a cursor of `list_rollouts`, written `1.2`. Raises InputError if there are more or fewer."""
    found = re.fullmatch(r"\d{1,18}" + r"\.\d{1,18}" * (numbers - 1), cursor, re.ASCII)
    if found is None:
        raise InputError(f"{cursor!r} is no cursor of this store; begin with the first page")
    return tuple(map(int, cursor.split(".")))


def to_cursor(place: Sequence[int]) -> str:
    return ".".join(map(str, place))
