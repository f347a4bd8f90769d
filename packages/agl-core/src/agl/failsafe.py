"""The boundary between telemetry and the agent: what goes wrong on our side is logged, never raised."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final

from agl.errors import AglError

logger = logging.getLogger("agl")

STRICT: Final = "AGL_STRICT"
"""Environment variable for the tests of an agent: with `1` in it, what an emitter cannot record is raised."""


class never_raises:
    """Log an exception from the body as `<what>: <error>` and go on after the `with`.

    Put only telemetry inside, never the agent's own code: its exceptions are not ours to swallow.
    """

    __slots__ = ("_what",)  # no generator: it stands around every event of an agent, and that would cost thrice as much

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        log_failure(self._what, error)
        return True


def log_failure(what: str, error: Exception) -> None:
    """Log what went wrong on our side and must not stop the agent: a defect of ours with its traceback."""
    if isinstance(error, AglError):
        logger.error("%s: %s", what, error)
    else:
        logger.error("%s", what, exc_info=error)


@contextmanager
def raises_if_strict(what: str) -> Iterator[None]:
    """`never_raises`, but with `AGL_STRICT=1` the exception goes on. For what the agent itself hands us."""
    if os.environ.get(STRICT) == "1":
        yield
        return
    with never_raises(what):
        yield
