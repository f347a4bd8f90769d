"""Rollouts, attempts and resources as database rows, and back. Structured values are JSON text."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any, Final

from agl.errors import AglError, InputError, UnknownIdError
from agl.store.protocol import MAX_PART_BYTES, Resource
from agl.store.rollout import Attempt, Rollout
from agl.store.span_row import checksum
from agl.store.states import AttemptState, RolloutState

ROLLOUT_COLUMNS: Final = (
    "rollout_id, input, group_id, mode, max_attempts, retry_on, timeout_s, unresponsive_s, metadata,"
    " state, attempts, ended_ns"
)
ATTEMPT_COLUMNS: Final = "attempt_id, rollout_id, number, worker_id, state, started_ns, heartbeat_ns, ended_ns, error"
RESOURCE_COLUMNS: Final = "name, version, uri, metadata"
ROLLOUT_ROW: Final = f"{ROLLOUT_COLUMNS}, checksum, progress_checksum"
"""The second checksum is of what changes with each attempt, so that a change hides no damage of the rest."""
ATTEMPT_ROW: Final = f"{ATTEMPT_COLUMNS}, checksum"
PART_ROW: Final = "name, version, digest, data"
RESOURCE_ROW: Final = f"{RESOURCE_COLUMNS}, checksum"
_PROGRESS: Final = ("max_attempts", "state", "attempts", "ended_ns")


def from_rollout(rollout: Rollout) -> tuple[Any, ...]:
    """`ROLLOUT_ROW` of a rollout to enqueue. Raises InputError, with its id, if its input is not a JSON value."""
    task = to_json(rollout.input, f"the input of rollout {rollout.rollout_id}")
    metadata = to_json(rollout.metadata, f"the metadata of rollout {rollout.rollout_id}")
    times = [None if time_s is None else float(time_s) for time_s in (rollout.timeout_s, rollout.unresponsive_s)]
    limits = (rollout.max_attempts, " ".join(sorted(rollout.retry_on)), *times)
    progress = (RolloutState.QUEUED, 0, None)
    row = (rollout.rollout_id, task, rollout.group_id, rollout.mode, *limits, metadata, *progress)
    return (*row, *_rollout_checksums(row))


def progress_checksum(rollout: Rollout) -> int:
    return _checksum(rollout.rollout_id, *(getattr(rollout, name) for name in _PROGRESS))


def _rollout_checksums(row: Sequence[Any]) -> tuple[int, int]:
    """The checksums of `ROLLOUT_COLUMNS`."""
    values = dict(zip(ROLLOUT_COLUMNS.split(", "), row, strict=True))
    progress = [values.pop(name) for name in _PROGRESS]
    return _checksum(*values.values()), _checksum(values["rollout_id"], *progress)


def from_attempt(attempt: Attempt) -> tuple[Any, ...]:
    """`ATTEMPT_ROW`."""
    row = astuple(attempt)
    return (*row, _attempt_checksum(row))


def _attempt_checksum(row: Sequence[Any]) -> int:
    """Without the heartbeat, which Cassandra changes alone."""
    return _checksum(*row[:6], *row[7:])


def is_rollout(row: Sequence[Any]) -> bool:
    """Whether `ROLLOUT_ROW` is that of a rollout, as it was stored. Checksums of earlier versions are None."""
    return _is_whole(to_rollout, _rollout_checksums, row[:-2], row[-2:])


def is_attempt(row: Sequence[Any]) -> bool:
    """As `is_rollout`."""
    return _is_whole(to_attempt, lambda row: (_attempt_checksum(row),), row[:-1], row[-1:])


def is_resource(row: Sequence[Any]) -> bool:
    """As `is_rollout`."""
    return _is_whole(to_resource, lambda row: (_checksum(*row),), row[:-1], row[-1:])


def _is_whole(
    read: Callable[[Sequence[Any]], Any],
    checksums: Callable[[Sequence[Any]], Sequence[int]],
    row: Sequence[Any],
    known: Sequence[Any],
) -> bool:
    try:
        read(row)
        return all(one in (None, other) for one, other in zip(known, checksums(row), strict=True))
    except (AglError, ValueError, TypeError, AttributeError):
        return False


def _checksum(*values: Any) -> int:
    return checksum(json.dumps(values).encode())


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
    """`RESOURCE_ROW` of a resource. Raises InputError, with its name, if its metadata is not a JSON value."""
    metadata = to_json(resource.metadata, f"the metadata of {resource.name}@{resource.version}")
    row = (resource.name, resource.version, resource.uri, metadata)
    return (*row, _checksum(*row))


def to_resource(row: Sequence[Any]) -> Resource:
    name, version, uri, metadata = row
    return Resource(name, version, uri, json.loads(metadata))


def from_part(name: str, version: int, digest: str, data: bytes) -> tuple[Any, ...]:
    """`PART_ROW`. Raises InputError if the digest is not that of the data, or these are too long."""
    row = (name, version, digest, data)
    if len(data) > MAX_PART_BYTES:
        raise InputError(f"a part of {name}@{version} has {len(data)} bytes, at most {MAX_PART_BYTES} are possible")
    if not is_part(row):
        raise InputError(f"a part of {name}@{version} is not of the digest {digest!r}, which should be its SHA-256")
    return row


def is_part(row: Sequence[Any]) -> bool:
    """Whether `PART_ROW` is what was stored."""
    *_, digest, data = row
    return isinstance(data, bytes) and hashlib.sha256(data).hexdigest() == digest


def no_version(name: str, version: int) -> UnknownIdError:
    return UnknownIdError(f"the store holds no version {version} of the resource {name!r}")


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
