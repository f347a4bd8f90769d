"""Evaluates the running canary of a store at intervals, in a thread of `agl serve`."""

import logging
import socket
import time
from contextlib import AbstractContextManager
from typing import Final

from agl.canary.decision import check
from agl.canary.history import last_event
from agl.errors import CanaryError
from agl.store import Store
from agl.store.background import repeating

logger = logging.getLogger(__name__)

_LOOK_S: Final = 10.0
"""Time between two looks for a running canary."""


def deciding(store: Store) -> AbstractContextManager[None]:
    """`check` the running canary every `canary.check_s` seconds; what fails is logged, and tried again."""
    return repeating("agl-canary", {"the canary could not be evaluated": _Judge(store).look}, _LOOK_S, logger)


class _Judge:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._by = f"agl serve on {socket.gethostname()}"
        self._next_s = 0.0

    def look(self) -> None:
        try:
            event = last_event(self._store)
            if event is None or not event.is_running or time.monotonic() < self._next_s:
                return
            self._next_s = time.monotonic() + event.canary.settings.check_s
            verdict, decided = check(self._store, self._by, time.time_ns())
            logger.warning("canary: %s", decided.summary() if decided else f"{verdict.action}: {verdict.reason}")
        except CanaryError as error:
            logger.warning("canary: %s", error)
