"""What the system reports of a process, and how its memory grows."""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Memory(NamedTuple):
    """Of a process, in MB."""

    own: float
    """That only this process has (RssAnon)."""
    whole: float
    """All of it, with pages of files (VmRSS)."""


def memory_mb(pid: int) -> Memory:
    status = Path(f"/proc/{pid}/status").read_text()
    return Memory(*(int(status.partition(name)[2].split()[0]) / 1024 for name in ("RssAnon:", "VmRSS:")))


def cpu_s(pid: int) -> float:
    """User and system time that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def machine_cpu_s() -> float:
    """Time that all cores of the machine have been busy so far, whoever used it; the host of a virtual one included."""
    user, nice, system, _idle, _iowait, *others = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")


def growth(measured: Sequence[tuple[float, Memory]]) -> Memory:
    """Growth per minute in the second half of `measured` (seconds, memory): the slope of a line through it."""
    half = measured[len(measured) // 2 :]
    minutes = [seconds / 60 for seconds, _ in half]
    return Memory(*(statistics.linear_regression(minutes, [memory[n] for _, memory in half]).slope for n in (0, 1)))
