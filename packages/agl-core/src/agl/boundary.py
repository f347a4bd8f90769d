"""The boundary between telemetry and the agent: what goes wrong on our side is logged, never raised."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from agl.errors import AglError

logger = logging.getLogger("agl")


@contextmanager
def never_raises(what: str) -> Iterator[None]:
    """Log an exception from the body as `<what>: <error>` and go on after the `with`.

    Put only telemetry inside, never the agent's own code: its exceptions are not ours to swallow.
    """
    try:
        yield
    except AglError as error:
        logger.error("%s: %s", what, error)
    except Exception:  # a defect of ours must not stop the agent; the traceback is in the log
        logger.exception("%s", what)
