"""The watchdog of stores: a thread that ends attempts over the limits of their rollouts."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from agl.errors import StoreError
from agl.store.protocol import Store

logger = logging.getLogger(__name__)


@contextmanager
def watching(*stores: Store, every_s: float = 2.0) -> Iterator[None]:
    """Call `end_overdue_attempts` every `every_s` seconds in a thread, which logs a StoreError and goes on."""
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(stores, every_s, stop), name="agl-watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _watch(stores: Sequence[Store], every_s: float, stop: threading.Event) -> None:
    while not stop.wait(every_s):
        for store in stores:
            try:
                for attempt in store.end_overdue_attempts():
                    logger.warning("attempt %s is %s: %s", attempt.attempt_id, attempt.state, attempt.error)
            except StoreError as error:
                logger.error("the watchdog could not look at %s: %s", store.uri, error)
