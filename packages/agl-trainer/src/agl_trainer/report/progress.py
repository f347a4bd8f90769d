"""The progress line: phase, step, reward, speed, time left, and the rollouts that are waited for."""

import contextlib
import os
import sys
import threading
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, Self, TextIO

_CLEAR = "\r\x1b[K"


@dataclass(frozen=True, slots=True)
class ProgressState:
    """Fields of the line; None is omitted."""

    phase: str
    step: int = 0
    steps: int | None = None
    reward: float | None = None
    tokens_per_s: float | None = None
    waiting_for: str | None = None
    cpu_shared: float | None = None
    """Share of the CPUs that other programs use."""

    def line(self, eta_s: float | None) -> str:
        """e.g. `grpo 12/40 · reward 0.532 · 812 tok/s · ETA 3:20 · waiting for 14 of 64 rollouts`."""
        parts = [
            f"{self.phase} {self.step}" + (f"/{self.steps}" if self.steps is not None else ""),
            f"reward {self.reward:.3f}" if self.reward is not None else "",
            f"{self.tokens_per_s:.0f} tok/s" if self.tokens_per_s is not None else "",
            f"ETA {clock(eta_s)}" if eta_s is not None else "",
            f"waiting for {self.waiting_for}" if self.waiting_for else "",
            f"cpu shared: {100 * self.cpu_shared:.0f} %" if self.cpu_shared is not None else "",
        ]
        return " · ".join(part for part in parts if part)


class Progress:
    """Draws the line on `stream`, in place if it is a terminal. Thread-safe; ignores errors of a closed terminal."""

    def __init__(self, stream: TextIO | None = None, *, every_s: float = 10.0) -> None:
        """`every_s`: minimum time between two lines, in seconds, if `stream` is no terminal."""
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._every_s = every_s
        self._lock = threading.Lock()
        self._state = ProgressState("starting")
        self._started_at, self._first_step = monotonic(), 0
        self._drawn, self._drawn_at = "", 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Print the last state as a permanent line, unless the user interrupts the block."""
        line = "" if kind is KeyboardInterrupt else f"{self._state.line(None)}\n"
        with self._lock:
            if self._drawn:
                self._write(f"{_CLEAR}{line}" if self._live else line)

    def start(self, phase: str, *, step: int = 0, steps: int | None = None) -> None:
        """Begin a phase; the time left is estimated from the steps since then."""
        with self._lock:
            self._state = ProgressState(phase, step, steps, cpu_shared=self._state.cpu_shared)
            self._started_at, self._first_step = monotonic(), step
            self._draw(due=True)

    def update(self, **changes: Any) -> None:
        """Change the named fields of `ProgressState`."""
        with self._lock:
            before, self._state = self._state, replace(self._state, **changes)
            self._draw(due=self._live or before.step != self._state.step)

    def note(self, text: str) -> None:
        """Print `text` as a separate line above the progress line."""
        with self._lock:
            self._write(f"{_CLEAR}{text}\n{self._drawn}" if self._live else f"{text}\n")

    def _eta_s(self) -> float | None:
        done = self._state.step - self._first_step
        if self._state.steps is None or done <= 0:
            return None
        return (monotonic() - self._started_at) / done * (self._state.steps - self._state.step)

    def _draw(self, *, due: bool) -> None:
        now = monotonic()
        if not due and now - self._drawn_at < self._every_s:
            return
        line = self._state.line(self._eta_s())
        if self._live:
            line = line[: _columns(self._stream) - 1]
        self._write(f"{_CLEAR}{line}" if self._live else f"{line}\n")
        self._drawn, self._drawn_at = line, now

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # the terminal was closed
            self._stream.write(text)
            self._stream.flush()


def clock(seconds: float) -> str:
    """`3:20` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _columns(stream: TextIO) -> int:
    with contextlib.suppress(OSError, ValueError):
        return os.get_terminal_size(stream.fileno()).columns or 80
    return 80
