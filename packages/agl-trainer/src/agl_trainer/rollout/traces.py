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
    represented: float = 1.0
    """How many groups it stands for: 1/p, if sampling kept it with probability p."""


def read_traces(store: Store, traces: TracesConfig) -> Iterator[Trajectory]:
    """Rollouts in `store` that match `traces` and made a model call, ordered by the arrival of their first span.

    Warns of those that no other stands for, because sampling keeps none like them.
    """
    seen: set[str] = set()
    never_kept = 0
    for _, spans in store.read_spans(store.rollout_ids()):
        if not spans or not _has_tags(spans, traces):
            continue
        trajectory = build_trajectory(spans)
        # A call without a parent is also listed under its trace id, which yields the same rollout twice.
        if trajectory.mode not in traces.modes or trajectory.rollout_id in seen:
            continue
        seen.add(trajectory.rollout_id)
        if trajectory.calls:
            yield trajectory
        elif trajectory.inclusion == 0:
            never_kept += 1
    if never_kept:
        logger.warning(
            "sampling left out %d rollouts of %s and keeps none like them, so training does not see any: "
            "they have more spans than sampling.max_span_per_minute, or sampling.base_rate is 0; raise it",
            never_kept,
            store.uri,
        )


def stored_groups(store: Store, traces: TracesConfig) -> list[StoredGroup]:
    """The groups of `read_traces`, ordered by their first rollout. Raises TrainingError if there are none."""
    groups: dict[str, list[str]] = {}
    represented: dict[str, float] = {}
    for trajectory in read_traces(store, traces):
        name = trajectory.group_id or trajectory.rollout_id
        groups.setdefault(name, []).append(trajectory.rollout_id)
        represented[name] = 1 / trajectory.inclusion
    if not groups:
        tags = f" with {traces.tags}" if traces.tags else ""
        raise TrainingError(
            f"{store.uri} holds no rollout of mode {' or '.join(traces.modes)}{tags} that made a model call; look at "
            "store_uri and train.traces"
        )
    return [StoredGroup(name, tuple(members), represented[name]) for name, members in groups.items()]


def load_groups(store: Store, groups: Sequence[StoredGroup]) -> list[Trajectory]:
    """Trajectories of the rollouts of `groups` whose spans the store still has."""
    found = store.query_spans_by_rollout([rollout_id for group in groups for rollout_id in group.rollout_ids])
    return [build_trajectory(spans) for spans in found.values() if spans]


def _has_tags(spans: Sequence[Span], traces: TracesConfig) -> bool:
    return all(any(span.attributes.get(name) == value for span in spans) for name, value in traces.tags.items())
