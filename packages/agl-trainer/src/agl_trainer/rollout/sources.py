"""Sources of the groups that a step trains on: agents run now, agents run ahead of the step, or the store."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from agl.config import TrainConfig
from agl.runner.runner import Outcome
from agl.seeds import derive
from agl.store import Rollout, Store
from agl.trajectory import Trajectory
from agl_trainer.rollout.group_pool import GroupPool, GroupRun
from agl_trainer.rollout.rollouts import Rollouts
from agl_trainer.rollout.traces import StoredGroup, load_groups

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """Groups of rollouts drawn from a source. `outcomes` is empty for rollouts that were not run for this training."""

    outcomes: list[Outcome]
    trajectories: list[Trajectory]
    metrics: Mapping[str, float] = field(default_factory=dict)


class RolloutSource(Protocol):
    """Supplies the groups of each step."""

    def draw(self, step: int, position: int, groups: range) -> RolloutBatch:
        """Groups number `groups` of `step`; `position` is the number of groups that earlier steps drew."""
        ...

    def prefetch(self, step: int) -> list[int]:
        """Start rollouts of later steps; called once `step` has drawn its groups, before it trains.

        Returns the numbers of the groups that a training that stops now has to run again when it resumes.
        """
        ...


@dataclass(frozen=True, slots=True)
class TaskStream(Generic[Item]):
    """Endless stream of tasks (or stored groups): epoch after epoch, each in its own order if `seed` is set."""

    items: Sequence[Item]
    seed: int | None
    """Seed of the shuffle; None keeps the listed order."""

    @classmethod
    def of(cls, items: Sequence[Item], train: TrainConfig) -> "TaskStream[Item]":
        return cls(items, train.seed if train.shuffle else None)

    def at(self, position: int) -> Item:
        epoch, index = divmod(position, len(self.items))
        if self.seed is not None:
            draw = random.Random(derive(self.seed, "order of tasks", epoch))
            index = draw.sample(range(len(self.items)), len(self.items))[index]
        return self.items[index]


@dataclass(frozen=True, slots=True)
class AgentSource:
    """Runs the agents of a step while the step waits."""

    rollouts: Rollouts
    tasks: TaskStream[Any]
    run: str
    group_size: int
    seed: int
    """`train.seed`."""

    def draw(self, step: int, position: int, groups: range) -> RolloutBatch:
        rollouts: list[Rollout] = []
        for group in groups:
            rollouts += self.group(f"{self.run}-{step + 1:05d}-g{group}", position + group)
        self.rollouts.make_live()
        return _read_back(self.rollouts, self.rollouts.run(rollouts))

    def prefetch(self, step: int) -> list[int]:
        """Does nothing: rollouts started before the update would sample from the old weights."""
        return []

    def group(self, name: str, number: int) -> list[Rollout]:
        """Rollouts of task `number` of the stream, as group `name`."""
        task, seeds = self.tasks.at(number), [derive(self.seed, "rollout", number, i) for i in range(self.group_size)]
        return [self.rollouts.make(f"{name}-r{i}", task, name, "train", seed) for i, seed in enumerate(seeds)]


@dataclass(slots=True)
class AsyncAgentSource:
    """Runs agents up to `pool.max_lag` steps ahead of the step that takes them, while earlier steps train."""

    agents: AgentSource
    pool: GroupPool
    interrupted: list[int]
    """Numbers of the groups that were in flight when the training stopped; launched before new ones."""
    next_number: int
    """Number of the next new group."""
    last_number: int
    """End of the range of groups that the training needs."""
    groups_per_step: int

    @classmethod
    @contextmanager
    def open(
        cls, agents: AgentSource, train: TrainConfig, position: int, steps: int, interrupted: Sequence[int] = ()
    ) -> "Iterator[AsyncAgentSource]":
        """`position`: groups drawn so far; `steps`: steps left; `interrupted`: groups in flight at the checkpoint."""
        run = partial(agents.rollouts.run, shows_progress=False)
        concurrency = max(1, train.concurrency // train.group_size)
        max_lag = train.max_staleness or 1
        with GroupPool(agents.rollouts.store, run, max_lag=max_lag, concurrency=concurrency) as pool:
            needed = position + steps * train.groups_per_step
            yield cls(agents, pool, [*interrupted], position + len(interrupted), needed, train.groups_per_step)

    def draw(self, step: int, position: int, groups: range) -> RolloutBatch:
        if not self.pool.pending:  # the first step
            self._launch(step, self.pool.max_lag * self.groups_per_step)
        missing = len(groups) - len(self.pool.pending)
        if missing > 0:  # a step that replaces groups needs more than were planned
            self.last_number = max(self.last_number, self.next_number + missing - len(self.interrupted))
            self._launch(step, missing)
        self.agents.rollouts.progress.update(waiting_for=f"{len(groups)} of {len(self.pool.pending)} groups")
        taken = self.pool.take(len(groups), step)
        return _read_back(self.agents.rollouts, [outcome for group in taken for outcome in group.outcomes or ()])

    def prefetch(self, step: int) -> list[int]:
        self._launch(step, self.pool.max_lag * self.groups_per_step - len(self.pool.pending))
        return sorted([*self.interrupted, *(group.number for group in self.pool.pending)])

    def _launch(self, step: int, count: int) -> None:
        """Launch up to `count` groups under the current weights, the interrupted first, none beyond `last_number`."""
        waiting = [*self.interrupted, *range(self.next_number, self.last_number)]
        numbers = waiting[: max(0, count)]
        if numbers:
            self.agents.rollouts.make_live()
        for number in numbers:
            name = f"{self.agents.run}-g{number:06d}"
            self.pool.launch(GroupRun(number, step, self.agents.group(name, number)))
        self.next_number += max(0, len(numbers) - len(self.interrupted))
        self.interrupted = self.interrupted[len(numbers) :]


@dataclass(frozen=True, slots=True)
class StoreSource:
    """Reads groups that the store already holds."""

    store: Store
    groups: TaskStream[StoredGroup]
    _taken: set[str] = field(default_factory=set)

    def draw(self, step: int, position: int, groups: range) -> RolloutBatch:
        if groups.start == 0:
            self._taken.clear()
        # A step that needs more groups than exist takes each once: a call must not train twice in a step.
        chosen = [self.groups.at(position + group) for group in groups]
        fresh = {group.group_id: group for group in chosen if group.group_id not in self._taken}
        self._taken.update(fresh)
        return RolloutBatch([], load_groups(self.store, list(fresh.values())))

    def prefetch(self, step: int) -> list[int]:
        """Does nothing: these rollouts have already run."""
        return []


def _read_back(rollouts: Rollouts, outcomes: list[Outcome]) -> RolloutBatch:
    return RolloutBatch(outcomes, rollouts.trajectories(outcomes))
