"""The clock of a store: it shows Unix time when it is set, and then goes by time that nobody can set.

An attempt that is watched, or a lease, therefore lasts as long as its limit says when the system's clock is set.
"""

import logging
import os
import time
from pathlib import Path
from typing import Final

_STEADY: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Time since the machine started; CLOCK_BOOTTIME of Linux counts sleep too."""
_JUMP_S: Final = 5.0
"""The system's clock is slowed or sped up to correct it; a difference of more was set."""
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_TIME_NAMESPACE: Final = Path("/proc/self/ns/time")
"""Of Linux from 5.6 on: a container can have a namespace in which the machine started at another time."""

_log = logging.getLogger(__name__)


class Clock:
    """Unix time in nanoseconds: `now_ns` at its creation (None: of the system), and from then on the time elapsed."""

    def __init__(self, name: str, now_ns: int | None = None) -> None:
        self._name = name
        self._system_offset_ns = time.time_ns() - _steady_ns()
        self.offset_ns = self._system_offset_ns if now_ns is None else now_ns - _steady_ns()
        """Its time minus the time since the machine started: with the same offset, all clocks of a machine agree."""

    def now_ns(self) -> int:
        steady_ns = _steady_ns()
        system_offset_ns = time.time_ns() - steady_ns
        jump_s = (system_offset_ns - self._system_offset_ns) / 1e9
        if abs(jump_s) > _JUMP_S:
            self._system_offset_ns = system_offset_ns
            _log.warning(
                "the clock of this machine was set by %+.0f s; leases and limits of the store %s count elapsed time",
                jump_s,
                self._name,
            )
        return steady_ns + self.offset_ns


def boot_id() -> str | None:
    """Id of the time since this machine started, as this process sees it; None if the system has none."""
    try:
        boot = _BOOT.read_text().strip()
    except OSError:
        return None
    return f"{boot} {os.readlink(_TIME_NAMESPACE)}" if os.path.lexists(_TIME_NAMESPACE) else boot


def _steady_ns() -> int:
    return time.clock_gettime_ns(_STEADY)
