"""Runs groups of rollouts beside the training: launched ahead of their step, taken as they end."""

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

from agl.errors import TrainingError
from agl.runner.runner import Outcome
from agl.store import Rollout, Store


@dataclass(slots=True, eq=False)
class GroupRun:
    """A launched group; it has ended once `outcomes` or `error` is set."""

    number: int
    """Index of the group within the training."""
    step: int
    """Step at which it was launched, so whose weights it samples from."""
    rollouts: Sequence[Rollout]
    outcomes: list[Outcome] | None = None
    error: BaseException | None = None

    @property
    def has_ended(self) -> bool:
        return self.outcomes is not None or self.error is not None


@dataclass
class GroupPool:
    """Runs each group in a thread of its own. Use as a context manager: leaving it cancels the groups that still run.

    `take` returns groups as they end, but waits for a group launched `max_lag` steps ago. So no group gets older than
    that, and none is discarded; a group that has not ended is left for a later step.
    """

    store: Store
    run: Callable[[Sequence[Rollout]], list[Outcome]]
    max_lag: int
    """Age in steps at which `take` waits for a group."""
    concurrency: int
    """Groups that run at a time; further ones wait."""
    pending: list[GroupRun] = field(default_factory=list)
    """Groups launched and not yet taken, oldest first."""
    _ended: "queue.SimpleQueue[GroupRun]" = field(default_factory=queue.SimpleQueue)
    _is_closed: bool = False

    def __post_init__(self) -> None:
        self._free = threading.Semaphore(self.concurrency)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed = True
        running = [rollout.rollout_id for group in self.pending if not group.has_ended for rollout in group.rollouts]
        self.store.cancel_rollouts(running)

    def launch(self, group: GroupRun) -> None:
        self.store.enqueue_rollouts(group.rollouts)  # before the thread starts, so that leaving the pool can cancel it
        self.pending.append(group)
        # A daemon thread: an agent that hangs does not keep the process alive.
        threading.Thread(target=self._run, args=(group,), name=f"agl group {group.number}", daemon=True).start()

    def take(self, count: int, step: int) -> list[GroupRun]:
        """Wait for `count` groups for `step`; returns them in launch order.

        Raises the error of a group that failed, and TrainingError if fewer than `count` were launched.
        """
        if count > len(self.pending):
            raise TrainingError(f"step {step} takes {count} groups, but only {len(self.pending)} were launched")
        taken: list[GroupRun] = []
        while len(taken) < count:
            overdue = [group for group in self.pending if step - group.step >= self.max_lag]
            ended = [group for group in overdue or self.pending if group.has_ended]
            for group in ended[: count - len(taken)]:
                if group.error is not None:
                    raise group.error
                self.pending.remove(group)
                taken.append(group)
            if len(taken) < count and not ended:
                self._ended.get()
        return sorted(taken, key=lambda group: group.number)

    def _run(self, group: GroupRun) -> None:
        try:
            with self._free:
                if not self._is_closed:
                    group.outcomes = self.run(group.rollouts)
        except BaseException as error:  # noqa: BLE001 - `take` raises it in the caller's thread
            group.error = error
        self._ended.put(group)
