"""The boundary between telemetry and the agent: failures on the telemetry side are logged, never raised."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final

from agl.errors import AglError

logger = logging.getLogger("agl")

STRICT: Final = "AGL_STRICT"
"""Environment variable for an agent's tests: with the value 1, emitters raise values that they cannot record."""


class never_raises:
    """Log an exception of the block as `<failure>: <error>` and continue after the block.

    Put only telemetry code inside: exceptions of the agent's own code must reach the agent.
    """

    __slots__ = ("_failure",)  # a class: a generator-based one takes three times as long, and this runs for each event

    def __init__(self, failure: str) -> None:
        self._failure = failure

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        log_failure(self._failure, error)
        return True


def log_failure(failure: str, error: Exception) -> None:
    """Log `failure` with the message of an AglError, or with the traceback of another exception, which is a defect."""
    if isinstance(error, AglError):
        logger.error("%s: %s", failure, error)
    else:
        logger.error("%s", failure, exc_info=error)


def is_strict() -> bool:
    """Whether emitters raise values that they cannot record as they are."""
    return os.environ.get(STRICT) == "1"


@contextmanager
def raises_if_strict(failure: str) -> Iterator[None]:
    """`never_raises`, except that `AGL_STRICT=1` lets the exception through. For values that the agent passes in."""
    if is_strict():
        yield
        return
    with never_raises(failure):
        yield
