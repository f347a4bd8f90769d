"""Releases the OpenMP worker threads with which torch computes on a CPU.

Every thread that runs torch operations has its own pool of workers. GNU OpenMP, which torch uses on Linux, counts the
workers of all pools: once they exceed the cores, each worker sleeps after every operation instead of spinning until the
next one. Sampling consists of thousands of short operations per second and then takes 50 % longer. A thread that has
finished computing therefore has to release its workers before another thread of the process samples.
"""

import ctypes
import logging
import os
from functools import cache
from pathlib import Path
from typing import Final

import torch

_OMP_PAUSE_HARD: Final = 2
"""OpenMP 5.0, section 3.2.44: frees the thread's resources; they are allocated again when needed."""

logger = logging.getLogger(__name__)


def warn_if_workers_spin() -> None:
    """Log a warning if torch was loaded before `agl_trainer` could shorten the spinning of workers without work."""
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} and _gnu_openmp() is not None:
        logger.warning(
            "torch was imported before agl_trainer, so its idle threads spin for milliseconds, and beside other "
            "programs the training takes several times as long; import agl_trainer first, or set GOMP_SPINCOUNT=5000"
        )


def release_openmp_workers() -> None:
    """End the workers of the calling thread. If it computes again, it gets new ones."""
    if (openmp := _gnu_openmp()) is not None:
        openmp.omp_pause_resource_all(_OMP_PAUSE_HARD)


@cache
def _gnu_openmp() -> ctypes.CDLL | None:
    """GNU OpenMP as loaded by torch; None for builds of torch with another OpenMP, whose workers do not sleep."""
    folder = Path(torch.__file__).parent
    found = [*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")]
    return ctypes.CDLL(str(found[0])) if found else None
