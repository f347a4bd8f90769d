"""Waiting until rollouts end: read their states, and read again after a notification or a poll interval."""

import threading
import time
from collections.abc import Callable
from typing import Final

from agl.store.rollout import Rollout

_POLL_S: Final = 0.05
"""Default interval. Another process may end a rollout, and SQLite sends no notification."""


class EndNotifier:
    """Wakes the threads of this process that wait for rollouts, at `notify` and every `poll_s` seconds."""

    def __init__(self, poll_s: float = _POLL_S) -> None:
        self._poll_s = poll_s
        self._changed = threading.Condition()
        self._notifications = 0

    def notify(self) -> None:
        """Tell the waiting threads that a rollout may have ended."""
        with self._changed:
            self._notifications += 1
            self._changed.notify_all()

    def wait_until_over(self, read: Callable[[], list[Rollout]], timeout_s: float | None) -> list[Rollout]:
        """Result of `read` once all its rollouts are over, or when the time is up."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            seen = self._notifications  # Before `read`: an end during the read must wake the wait below.
            rollouts = read()
            left_s = self._poll_s if deadline is None else min(self._poll_s, deadline - time.monotonic())
            if left_s <= 0 or all(rollout.state.is_over for rollout in rollouts):
                return rollouts
            with self._changed:
                self._changed.wait_for(lambda seen=seen: self._notifications != seen, left_s)
