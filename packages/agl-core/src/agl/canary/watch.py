"""Evaluates the running canary of a store at intervals, in a thread of `agl serve`."""

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from agl.canary.decision import check
from agl.canary.history import last_event
from agl.errors import AglError, CanaryError
from agl.store import Store

logger = logging.getLogger(__name__)

_LOOK_S: Final = 10.0
"""Time between two looks for a running canary."""


@contextmanager
def deciding(store: Store) -> Iterator[None]:
    """`check` the running canary every `canary.check_s` seconds; what fails is logged, and tried again."""
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(store, stop), name="agl-canary", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _watch(store: Store, stop: threading.Event) -> None:
    by, next_s = f"agl serve on {socket.gethostname()}", 0.0
    while not stop.wait(_LOOK_S):
        try:
            event = last_event(store)
            if event is None or not event.is_running or time.monotonic() < next_s:
                continue
            next_s = time.monotonic() + event.canary.settings.check_s
            verdict, decided = check(store, by, time.time_ns())
            logger.warning("canary: %s", decided.summary() if decided else f"{verdict.action}: {verdict.reason}")
        except CanaryError as error:
            logger.warning("canary: %s", error)
        except AglError as error:
            logger.error("the canary could not be evaluated: %s", error)
        except Exception:  # else a canary would go on, and nobody judge it
            logger.exception("the canary could not be evaluated, which is a defect of agl")
