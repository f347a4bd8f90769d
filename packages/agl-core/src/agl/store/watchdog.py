"""The watchdog of stores: a thread that ends attempts over the limits of their rollouts."""

import logging
from contextlib import AbstractContextManager
from functools import partial

from agl.store.background import repeating
from agl.store.protocol import Store

logger = logging.getLogger(__name__)


def watching(*stores: Store, every_s: float = 2.0) -> AbstractContextManager[None]:
    """Call `end_overdue_attempts` every `every_s` seconds in a thread, which logs an error and goes on."""
    jobs = {f"the watchdog could not look at {store.uri}": partial(_end_overdue, store) for store in stores}
    return repeating("agl-watchdog", jobs, every_s, logger)


def _end_overdue(store: Store) -> None:
    for attempt in store.end_overdue_attempts():
        logger.warning("attempt %s is %s: %s", attempt.attempt_id, attempt.state, attempt.error)
