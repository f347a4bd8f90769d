"""Groups of rollouts that run beside the training: launched ahead, taken as they end, else carried over."""

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

from agl.errors import TrainingError
from agl.store import Rollout, Store
from agl_trainer.rollout.rollouts import Ran


@dataclass(slots=True, eq=False)
class Launched:
    """A group under way."""

    number: int
    """Of all groups of the training."""
    step: int
    """Under whose weights it began."""
    rollouts: Sequence[Rollout]
    ran: Ran | None = None
    error: BaseException | None = None


@dataclass
class Feed:
    """Runs groups, each in a thread of its own. Use as a context manager: at its end what still runs is cancelled.

    `take` gives the groups that end first, but waits for one that began `max_lag` steps ago: none gets older than that,
    and none is thrown away. What has not ended stays for a later step.
    """

    store: Store
    run: Callable[[Sequence[Rollout]], Ran]
    max_lag: int
    at_once: int
    """Groups that run; those launched after them wait for a place."""
    launched: list[Launched] = field(default_factory=list)
    """Those that were not taken yet, the oldest first."""
    _ended: "queue.SimpleQueue[Launched]" = field(default_factory=queue.SimpleQueue)
    _is_closed: bool = False

    def __post_init__(self) -> None:
        self._places = threading.Semaphore(self.at_once)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed = True
        under_way = [rollout.rollout_id for group in self.launched if not _is_over(group) for rollout in group.rollouts]
        self.store.cancel_rollouts(under_way)

    def launch(self, group: Launched) -> None:
        self.store.enqueue_rollouts(group.rollouts)  # here, so that whatever was launched can be cancelled
        self.launched.append(group)
        # A daemon, so that an agent that hangs does not keep the process from ending.
        threading.Thread(target=self._run, args=(group,), name=f"agl group {group.number}", daemon=True).start()

    def take(self, count: int, step: int) -> list[Launched]:
        """`count` groups for `step`, in the order of their launch. Raises what running one of them raised, and
        TrainingError where fewer were launched.
        """
        if count > len(self.launched):
            raise TrainingError(f"step {step} takes {count} groups, but only {len(self.launched)} were launched")
        taken: list[Launched] = []
        while len(taken) < count:
            due = [group for group in self.launched if step - group.step >= self.max_lag]
            over = [group for group in due or self.launched if _is_over(group)]
            for group in over[: count - len(taken)]:
                if group.error is not None:
                    raise group.error
                self.launched.remove(group)
                taken.append(group)
            if len(taken) < count and not over:
                self._ended.get()
        return sorted(taken, key=lambda group: group.number)

    def _run(self, group: Launched) -> None:
        try:
            with self._places:
                if not self._is_closed:
                    group.ran = self.run(group.rollouts)
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever takes the group
            group.error = error
        self._ended.put(group)


def _is_over(group: Launched) -> bool:
    return group.ran is not None or group.error is not None
