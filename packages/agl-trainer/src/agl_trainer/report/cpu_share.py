"""The share of the CPUs that other programs use, shown with the progress: a training beside them takes longer."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from agl_trainer.report.progress import Progress

_SHOWN_FROM = 0.2
_EVERY_S = 10.0


@contextmanager
def shows_cpu_share(progress: Progress, every_s: float = _EVERY_S) -> Iterator[None]:
    """Keep the share that `progress` shows up to date in the block; it shows none below a fifth."""
    done = threading.Event()

    def watch() -> None:
        before, was_shown = _times(), False
        while not done.wait(every_s):
            now = _times()
            share = others_share(before, now)
            is_shown = share >= _SHOWN_FROM
            if is_shown or was_shown:
                progress.show_cpu_share(share if is_shown else None)
            before, was_shown = now, is_shown

    thread = threading.Thread(target=watch, name="agl-cpu-share", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def others_share(before: tuple[float, float, float], now: tuple[float, float, float]) -> float:
    """Share of the CPU time between two readings of `_times` that neither this program used nor nobody."""
    total, busy, own = (after - earlier for earlier, after in zip(before, now, strict=True))
    return max(0.0, busy - own) / total if total > 0 else 0.0


def _times() -> tuple[float, float, float]:
    """Seconds since some moment, over the CPUs that this process may use: in all, busy, and used by this program."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(psutil.cpu_count() or 1)
    per_cpu = psutil.cpu_times(percpu=True)
    total = busy = 0.0
    for number in usable:
        times = per_cpu[number]
        # Linux counts the time of guests within `user` and `nice`.
        whole = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        total += whole
        busy += whole - times.idle - getattr(times, "iowait", 0.0)
    return total, busy, _own_s()


def _own_s() -> float:
    """CPU time of this process and of its children, those that have ended included."""
    here = psutil.Process()
    own = sum(here.cpu_times()[:4])
    for child in here.children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            own += sum(child.cpu_times()[:4])
    return own
