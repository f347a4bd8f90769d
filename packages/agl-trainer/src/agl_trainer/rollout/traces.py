"""Rollouts that are in a store already, as something to train on: found, filtered and put into groups."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agl.config import TracesConfig
from agl.errors import TrainingError
from agl.span import Span
from agl.store import Store
from agl.trajectory import Trajectory, build_trajectory


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """Rollouts of one task. One that names no group is a group of its own."""

    group_id: str
    rollout_ids: tuple[str, ...]


def read_traces(store: Store, traces: TracesConfig) -> Iterator[Trajectory]:
    """The rollouts in `store` that `traces` asks for and that made a call, by the arrival of their first spans."""
    seen: set[str] = set()
    for rollout_id in store.rollout_ids():
        spans = store.query_spans(rollout_id)
        if not spans or not _has_tags(spans, traces):
            continue
        trajectory = build_trajectory(spans)
        # A call without a parent is found by its own trace too, and that is the same rollout once more.
        if trajectory.mode in traces.modes and trajectory.calls and trajectory.rollout_id not in seen:
            seen.add(trajectory.rollout_id)
            yield trajectory


def stored_groups(store: Store, traces: TracesConfig) -> list[StoredGroup]:
    """The groups of `read_traces`, in the order of their first rollouts. Raises TrainingError where there are none."""
    groups: dict[str, list[str]] = {}
    for trajectory in read_traces(store, traces):
        groups.setdefault(trajectory.group_id or trajectory.rollout_id, []).append(trajectory.rollout_id)
    if not groups:
        tags = f" with {traces.tags}" if traces.tags else ""
        raise TrainingError(
            f"{store.uri} holds no rollout of mode {' or '.join(traces.modes)}{tags} that made a model call; look at "
            "store_uri and train.traces"
        )
    return [StoredGroup(name, tuple(members)) for name, members in groups.items()]


def load_groups(store: Store, groups: Sequence[StoredGroup]) -> list[Trajectory]:
    """The trajectories of all rollouts of `groups` that are still there."""
    found = [store.query_spans(rollout_id) for group in groups for rollout_id in group.rollout_ids]
    return [build_trajectory(spans) for spans in found if spans]


def _has_tags(spans: Sequence[Span], traces: TracesConfig) -> bool:
    return all(any(span.attributes.get(name) == value for span in spans) for name, value in traces.tags.items())
