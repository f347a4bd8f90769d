"""Waiting for rollouts to end: read, and read again when something may have changed."""

import threading
import time
from collections.abc import Callable
from typing import Final

from agl.store.rollout import Rollout

_LOOK_EVERY_S: Final = 0.05
"""Other processes end rollouts as well; how long that may go unnoticed where the backend does not tell."""


class Endings:
    """Wakes those who wait in this process when a rollout may have ended, and every `look_every_s` to look again."""

    def __init__(self, look_every_s: float = _LOOK_EVERY_S) -> None:
        self._look_every_s = look_every_s
        self._changed = threading.Condition()
        self._count = 0

    def announce(self) -> None:
        with self._changed:
            self._count += 1
            self._changed.notify_all()

    def wait_until_over(self, read: Callable[[], list[Rollout]], timeout_s: float | None) -> list[Rollout]:
        """What `read` returns once all are over, or the time is up."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            seen = self._count  # before reading: what ends meanwhile is noticed below
            rollouts = read()
            left_s = self._look_every_s if deadline is None else min(self._look_every_s, deadline - time.monotonic())
            if left_s <= 0 or all(rollout.state.is_over for rollout in rollouts):
                return rollouts
            with self._changed:
                self._changed.wait_for(lambda seen=seen: self._count != seen, left_s)
