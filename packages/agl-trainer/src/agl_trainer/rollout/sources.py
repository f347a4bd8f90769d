"""Where the groups of a step come from: agents that run now, agents that ran ahead of it, or the store."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from agl.config import TrainConfig
from agl.store import Rollout, Store
from agl.trajectory import Trajectory
from agl_trainer.rollout.feed import Feed, Launched
from agl_trainer.rollout.rollouts import Ran, Rollouts
from agl_trainer.rollout.runner import Outcome
from agl_trainer.rollout.traces import StoredGroup, load_groups

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Drawn:
    """Groups of rollouts: as they ended, where they were run for this, and as they were recorded."""

    outcomes: list[Outcome]
    trajectories: list[Trajectory]
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the source has to say of them."""


class Source(Protocol):
    """What a training draws from. `groups` are numbers within a step, `position` counts those of the steps before."""

    def draw(self, step: int, position: int, groups: range) -> Drawn: ...

    def run_ahead(self, step: int) -> None:
        """Called when `step` has drawn what it needs, before it trains."""
        ...


@dataclass(frozen=True, slots=True)
class Deck(Generic[Item]):
    """Tasks, or groups, in an endless sequence of epochs."""

    items: Sequence[Item]
    seed: int | None
    """Of a new order in each epoch; None: as they are listed."""

    @classmethod
    def of(cls, items: Sequence[Item], train: TrainConfig) -> "Deck[Item]":
        return cls(items, train.seed if train.shuffle else None)

    def at(self, position: int) -> Item:
        epoch, place = divmod(position, len(self.items))
        if self.seed is not None:
            place = random.Random(f"{self.seed}-{epoch}").sample(range(len(self.items)), len(self.items))[place]
        return self.items[place]


@dataclass(frozen=True, slots=True)
class Agents:
    """Rollouts that run while the step waits for them."""

    rollouts: Rollouts
    tasks: Deck[Any]
    run: str
    group_size: int

    def draw(self, step: int, position: int, groups: range) -> Drawn:
        asked = [
            rollout
            for group in groups
            for rollout in self.group(f"{self.run}-{step + 1:05d}-g{group}", position + group)
        ]
        self.rollouts.make_live()
        return drawn(self.rollouts, [self.rollouts.run(asked)])

    def run_ahead(self, step: int) -> None:
        """Nothing: what is sampled now would be of old weights."""

    def group(self, name: str, number: int) -> list[Rollout]:
        """The rollouts of the task at `number`."""
        task = self.tasks.at(number)
        return [self.rollouts.make(f"{name}-r{i}", task, name, "train") for i in range(self.group_size)]


@dataclass(slots=True)
class AgentsAhead:
    """Rollouts that began up to `feed.max_lag` steps before the one that takes them, and ran while others trained."""

    agents: Agents
    feed: Feed
    next_number: int
    """Of the group to be launched next."""
    last_number: int
    """No group from this number on is needed."""
    groups_per_step: int

    @classmethod
    @contextmanager
    def open(cls, agents: Agents, train: TrainConfig, position: int, steps: int) -> "Iterator[AgentsAhead]":
        """`position`: groups drawn before; `steps`: those that are left."""

        def run(rollouts: Sequence[Rollout]) -> Ran:
            return agents.rollouts.run(rollouts, is_said=False)

        at_once = max(1, train.concurrency // train.group_size)
        with Feed(agents.rollouts.store, run, max_lag=train.max_staleness or 1, at_once=at_once) as feed:
            needed = position + steps * train.groups_per_step
            yield cls(agents, feed, position, needed, train.groups_per_step)

    def draw(self, step: int, position: int, groups: range) -> Drawn:
        if not self.feed.launched:  # the first step
            self._launch(step, self.feed.max_lag * self.groups_per_step)
        missing = len(groups) - len(self.feed.launched)
        if missing > 0:  # a step that draws again needs more than was reckoned with
            self.last_number = max(self.last_number, self.next_number + missing)
            self._launch(step, missing)
        self.agents.rollouts.progress.update(waiting_for=f"{len(groups)} of {len(self.feed.launched)} groups")
        taken = self.feed.take(len(groups), step)
        return drawn(self.agents.rollouts, [group.ran for group in taken if group.ran])

    def run_ahead(self, step: int) -> None:
        self._launch(step, self.feed.max_lag * self.groups_per_step - len(self.feed.launched))

    def _launch(self, step: int, count: int) -> None:
        """Launch `count` groups under the present weights, but none that no step needs."""
        last = min(self.next_number + count, self.last_number)
        if last > self.next_number:
            self.agents.rollouts.make_live()
        for number in range(self.next_number, last):
            name = f"{self.agents.run}-g{number:06d}"
            self.feed.launch(Launched(number, step, self.agents.group(name, number)))
        self.next_number = max(last, self.next_number)


@dataclass(frozen=True, slots=True)
class StoredRollouts:
    """Rollouts that are in the store already."""

    store: Store
    groups: Deck[StoredGroup]
    _taken: set[str] = field(default_factory=set)

    def draw(self, step: int, position: int, groups: range) -> Drawn:
        if groups.start == 0:
            self._taken.clear()
        # A step of more groups than there are takes none twice: its calls would train twice.
        chosen = [self.groups.at(position + group) for group in groups]
        fresh = {group.group_id: group for group in chosen if group.group_id not in self._taken}
        self._taken.update(fresh)
        return Drawn([], load_groups(self.store, list(fresh.values())))

    def run_ahead(self, step: int) -> None:
        """Nothing: they have run."""


def drawn(rollouts: Rollouts, ran: Sequence[Ran]) -> Drawn:
    outcomes = [outcome for one in ran for outcome in one.outcomes + one.lost]
    return Drawn(outcomes, rollouts.trajectories(outcomes))
