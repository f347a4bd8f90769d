"""The threads that torch computes with on a CPU.

Each thread that computes has workers of its own. GNU OpenMP, with which torch comes on Linux, counts them all together:
where they are more than the cores, all of them sleep at the end of each operation instead of waiting awake for the
next. Sampling, which is thousands of short operations a second, then takes half as long again. So who has computed, and
leaves the cores to another thread of this process, has to give its workers back.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Final

import torch

_HARD: Final = 2
"""omp_pause_hard, OpenMP 5.0, section 3.2.44: what a thread holds is freed, and comes again when it is needed."""


def give_back_workers() -> None:
    """End the workers of the calling thread, which may go on computing: it then has new ones."""
    if (openmp := _openmp()) is not None:
        openmp.omp_pause_resource_all(_HARD)


@cache
def _openmp() -> ctypes.CDLL | None:
    """GNU OpenMP as torch has loaded it; other builds of torch have another, which does not count so."""
    folder = Path(torch.__file__).parent
    found = [*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")]
    return ctypes.CDLL(str(found[0])) if found else None
