"""Jobs on stores that a server does at intervals, in a thread."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from agl.errors import AglError


@contextmanager
def repeating(
    thread_name: str, jobs: Mapping[str, Callable[[], object]], every_s: float, logger: logging.Logger
) -> Iterator[None]:
    """During the block, do each of `jobs` every `every_s` seconds, one after another.

    A job that fails is logged as `<its key>: <error>` and done again the next time, after an unexpected error too:
    if the thread ended, nobody would do it.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_repeat, args=(jobs, every_s, logger, stop), name=thread_name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _repeat(
    jobs: Mapping[str, Callable[[], object]], every_s: float, logger: logging.Logger, stop: threading.Event
) -> None:
    while not stop.wait(every_s):
        for failure, job in jobs.items():
            try:
                job()
            except AglError as error:
                logger.error("%s: %s", failure, error)
            except Exception:
                logger.exception("%s, which is a defect of agl", failure)
