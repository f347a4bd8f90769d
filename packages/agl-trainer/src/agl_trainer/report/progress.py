"""Progress on the user's terminal: a bar for the phase in progress, and a line for each finished one."""

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, Self, TextIO, cast

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

_BAR_FROM_COLUMNS = 60
"""Width of a terminal from which the bar is shown. It takes an eighth of the width."""


@dataclass(frozen=True, slots=True)
class ProgressState:
    """A phase in progress; None is omitted."""

    phase: str
    began: float
    """Time of the clock `monotonic`, as the next one."""
    step_began: float
    first_step: int = 0
    """Steps that were done as the phase began."""
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    reward: float | None = None
    trained: str | None = None
    """Calls that trained in the last step, of all its calls: `12/48`."""
    waiting_for: str | None = None
    tokens_per_s: float | None = None

    def name(self) -> str:
        """`grpo 12/40`, or the phase alone if it has no steps."""
        return self.phase if self.steps is None else f"{self.phase} {self.step}/{self.steps}"

    def times(self, now: float) -> str:
        """`0:50, 3:20 left`, or only the time since the phase began."""
        left_s, elapsed = self.left_s(now), clock(now - self.began)
        return elapsed if left_s is None else f"{elapsed}, {clock(left_s)} left"

    def left_s(self, now: float) -> float | None:
        """Seconds until the last step ends; None before the first one ends.

        A step takes the mean of the finished ones, but the unfinished one at least the time that it has taken so far.
        """
        done = self.step - self.first_step
        if self.steps is None or done <= 0 or self.step >= self.steps:
            return None
        mean, so_far = (self.step_began - self.began) / done, now - self.step_began
        return max(mean - so_far, 0.0) + mean * (self.steps - self.step - 1)

    def results(self) -> list[str]:
        return [
            *([f"loss {self.loss:.3f}"] if self.loss is not None else []),
            *([f"reward {self.reward:.3f}"] if self.reward is not None else []),
            *([f"trained {self.trained} calls"] if self.trained else []),
        ]

    def details(self) -> list[str]:
        return [
            *([f"waiting for {self.waiting_for}"] if self.waiting_for else []),
            *([f"{self.tokens_per_s:.0f} tok/s"] if self.tokens_per_s is not None else []),
        ]


class Progress:
    """Shows phases on `stream`: a bar if it is a terminal, else lines. Thread-safe; a closed terminal is ignored."""

    def __init__(self, stream: TextIO | None = None, *, every_s: float = 10.0) -> None:
        """`every_s`: minimum time between two lines within a phase, in seconds, if `stream` is no terminal."""
        file = _Unbreakable(stream or sys.stderr)
        self._console = Console(file=cast(TextIO, file), force_terminal=file.isatty(), highlight=False, soft_wrap=True)
        self._every_s = every_s
        self._lock = threading.Lock()
        self._state: ProgressState | None = None
        self._cpu_shared: float | None = None
        self._printed_at = 0.0
        self._spinner = Spinner("dots")
        self._live: Live | None = None
        if self._console.is_interactive:
            redirects = sys.stdout.isatty()  # Else it is not the terminal, and keeps what agents print.
            self._live = Live(
                console=self._console, get_renderable=self._bar, transient=True, redirect_stdout=redirects
            )
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self._live is not None:
            self._stack.enter_context(_logs_above(self._live))
            self._console.show_cursor()  # A process that ends at once could not show it again.
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def phase(self, name: str, *, step: int = 0, steps: int | None = None) -> Iterator[None]:
        """Show a phase during the block, and its result after it. A phase may be within another."""
        now = monotonic()
        with self._lock:
            outer = self._state
            self._state = ProgressState(name, began=now, step_began=now, first_step=step, step=step, steps=steps)
        if self._live is None:
            self.note(name)
        else:
            self._live.refresh()
        try:
            yield
        finally:
            with self._lock:
                ended, self._state = self._state, outer
        if ended is not None and ended.step > ended.first_step:
            self.note(" · ".join([ended.name(), *ended.results(), clock(monotonic() - ended.began)]))

    def update(self, **changes: Any) -> None:
        """Change the named fields of the phase in progress."""
        with self._lock:
            before = self._state
            if before is None:
                return
            self._state = replace(before, **changes)
            if self._state.step != before.step:
                self._state = replace(self._state, step_began=monotonic())
        self._print_line()

    def show_cpu_share(self, others: float | None) -> None:
        """Show the share of the CPUs that other programs use, from 0 to 1; None shows nothing."""
        self._cpu_shared = others
        self._print_line()

    def note(self, text: str) -> None:
        """Print `text` as a line of its own."""
        if self._live is not None:
            self._live.refresh()  # It is drawn again below the line.
        with self._lock:
            self._console.print(Text(text))

    def _print_line(self) -> None:
        """Without a terminal: print the state, unless the last line is too recent."""
        state, now = self._state, monotonic()
        if self._live is None and state is not None and now - max(self._printed_at, state.began) >= self._every_s:
            self._printed_at = now
            self.note(" · ".join([state.name(), state.times(now), *self._details(state)]))

    def _details(self, state: ProgressState) -> list[str]:
        shared = [] if self._cpu_shared is None else [f"cpu shared: {100 * self._cpu_shared:.0f} %"]
        return [*state.results(), *shared, *state.details()]

    def _bar(self) -> RenderableType:
        state, width = self._state, self._console.width
        if state is None:
            return ""
        details = Text(" · ".join(self._details(state)), style="dim", no_wrap=True, overflow="ellipsis")
        cells = [self._spinner, state.name(), state.times(monotonic()), details]
        columns = [Column(no_wrap=True), Column(no_wrap=True), Column(no_wrap=True), Column()]
        if state.steps is not None and width >= _BAR_FROM_COLUMNS:
            cells.insert(2, ProgressBar(total=state.steps, completed=state.step, width=width // 8))
            columns.insert(2, Column(no_wrap=True))
        grid = Table.grid(*columns, padding=(0, 1))
        grid.add_row(*cells)
        return grid


class _Unbreakable:
    """Ignores errors of a closed terminal, so that they do not end a training."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


@contextlib.contextmanager
def _logs_above(live: Live) -> Iterator[None]:
    """Show `live` in the block, and print above it what handlers log to standard error."""
    handlers = [handler for handler in logging.root.handlers if isinstance(handler, logging.StreamHandler)]
    streams = [(handler, handler.stream) for handler in handlers if handler.stream is sys.stderr]
    with live:
        for handler, _ in streams:
            handler.setStream(sys.stderr)  # The one that `live` has set.
        try:
            yield
        finally:
            for handler, stream in streams:
                handler.setStream(stream)


def clock(seconds: float) -> str:
    """`3:20` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
