"""One live line that says where a training is and what it waits for."""

import contextlib
import os
import sys
import threading
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, Self, TextIO

_CLEAR = "\r\x1b[K"


@dataclass(frozen=True, slots=True)
class Standing:
    """What the line shows; None is left out."""

    phase: str
    step: int = 0
    steps: int | None = None
    reward: float | None = None
    tokens_per_s: float | None = None
    waiting_for: str | None = None

    def line(self, eta_s: float | None) -> str:
        """e.g. `grpo 12/40 · reward 0.532 · 812 tok/s · ETA 3:20 · waiting for 14 of 64 rollouts`."""
        parts = [
            f"{self.phase} {self.step}" + (f"/{self.steps}" if self.steps is not None else ""),
            f"reward {self.reward:.3f}" if self.reward is not None else "",
            f"{self.tokens_per_s:.0f} tok/s" if self.tokens_per_s is not None else "",
            f"ETA {clock(eta_s)}" if eta_s is not None else "",
            f"waiting for {self.waiting_for}" if self.waiting_for else "",
        ]
        return " · ".join(part for part in parts if part)


class Progress:
    """The line on `stream` (standard error): redrawn in place on a terminal, else a plain line now and then.

    Thread-safe. A terminal that has gone away never stops the training.
    """

    def __init__(self, stream: TextIO | None = None, *, every_s: float = 10.0) -> None:
        """`every_s`: shortest time between two lines where `stream` is no terminal."""
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._every_s = every_s
        self._lock = threading.Lock()
        self._standing = Standing("starting")
        self._started_at, self._first_step = monotonic(), 0
        self._drawn, self._drawn_at = "", 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, phase: str, *, step: int = 0, steps: int | None = None) -> None:
        """Begin a phase; the time left is reckoned from here."""
        with self._lock:
            self._standing = Standing(phase, step, steps)
            self._started_at, self._first_step = monotonic(), step
            self._draw(due=True)

    def update(self, **changes: Any) -> None:
        """Change fields of `Standing`; the others stay."""
        with self._lock:
            before, self._standing = self._standing, replace(self._standing, **changes)
            self._draw(due=self._live or before.step != self._standing.step)

    def note(self, text: str) -> None:
        """Print `text` as a line of its own, above the live one."""
        with self._lock:
            self._write(f"{_CLEAR}{text}\n" if self._live else f"{text}\n")
            if self._live:
                self._write(self._drawn)

    def close(self) -> None:
        """Leave the last line standing."""
        line = self._standing.line(None)
        with self._lock:
            if self._drawn:
                self._write(f"{_CLEAR}{line}\n" if self._live else f"{line}\n")

    def _eta_s(self) -> float | None:
        done = self._standing.step - self._first_step
        if self._standing.steps is None or done <= 0:
            return None
        return (monotonic() - self._started_at) / done * (self._standing.steps - self._standing.step)

    def _draw(self, *, due: bool) -> None:
        now = monotonic()
        if not due and now - self._drawn_at < self._every_s:
            return
        line = self._standing.line(self._eta_s())
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
