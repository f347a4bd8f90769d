"""Finds, filters and groups rollouts that a store already holds, to train on them."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agl.config import TracesConfig
from agl.errors import TrainingError
from agl.span import Span
from agl.store import Store
from agl.trajectory import Trajectory, build_trajectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """Rollouts of one task. A rollout without a group id is a group by itself."""

    group_id: str
    rollout_ids: tuple[str, ...]


def read_traces(store: Store, traces: TracesConfig) -> Iterator[Trajectory]:
    """Rollouts in `store` that match `traces` and made a model call, ordered by the arrival of their first span."""
    seen: set[str] = set()
    for rollout_id in store.rollout_ids():
        spans = store.query_spans(rollout_id)
        if not spans or not _has_tags(spans, traces):
            continue
        trajectory = build_trajectory(spans)
        # A call without a parent is also listed under its trace id, which yields the same rollout twice.
        if trajectory.mode in traces.modes and trajectory.calls and trajectory.rollout_id not in seen:
            seen.add(trajectory.rollout_id)
            yield trajectory


def stored_groups(store: Store, traces: TracesConfig) -> list[StoredGroup]:
    """The groups of `read_traces`, ordered by their first rollout. Raises TrainingError if there are none."""
    groups: dict[str, list[str]] = {}
    sampled = 0
    for trajectory in read_traces(store, traces):
        groups.setdefault(trajectory.group_id or trajectory.rollout_id, []).append(trajectory.rollout_id)
        sampled += trajectory.inclusion < 1
    if not groups:
        tags = f" with {traces.tags}" if traces.tags else ""
        raise TrainingError(
            f"{store.uri} holds no rollout of mode {' or '.join(traces.modes)}{tags} that made a model call; look at "
            "store_uri and train.traces"
        )
    if sampled:
        logger.warning(
            "%d rollouts of %s stand for others that sampling left out, and have no weight for that: the training "
            "sees rewarded rollouts more often than they are; train on a store without `sampling` to avoid it",
            sampled,
            store.uri,
        )
    return [StoredGroup(name, tuple(members)) for name, members in groups.items()]


def load_groups(store: Store, groups: Sequence[StoredGroup]) -> list[Trajectory]:
    """Trajectories of the rollouts of `groups` whose spans the store still has."""
    found = [store.query_spans(rollout_id) for group in groups for rollout_id in group.rollout_ids]
    return [build_trajectory(spans) for spans in found if spans]


def _has_tags(spans: Sequence[Span], traces: TracesConfig) -> bool:
    return all(any(span.attributes.get(name) == value for span in spans) for name, value in traces.tags.items())
