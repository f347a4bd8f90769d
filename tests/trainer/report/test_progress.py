"""The progress line, on a real pseudo-terminal and in a file."""

import errno
import fcntl
import os
import pty
import struct
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agl_trainer.report import progress
from agl_trainer.report.progress import Progress, clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock of the progress line."""
    time = [1000.0]
    monkeypatch.setattr(progress, "monotonic", lambda: time[0])  # not of `time`: threads of others wait by that
    return lambda seconds: time.__setitem__(0, 1000.0 + seconds)


def on_terminal(use: Callable[[Progress], None], columns: int = 100) -> str:
    """Output of `use` on a pseudo-terminal of that width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(theirs, "w") as stream, Progress(stream) as line:
        use(line)
    return b"".join(_read_all(ours)).decode()


def _read_all(terminal: int) -> Iterator[bytes]:
    """Read until the other side closes, which a terminal signals by an error; data may arrive in pieces."""
    try:
        while piece := os.read(terminal, 65536):
            yield piece
    except OSError as error:
        assert error.errno == errno.EIO
    finally:
        os.close(terminal)


def test_on_a_terminal_one_line_is_redrawn_in_place(now: Callable[[float], None]) -> None:
    def use(line: Progress) -> None:
        line.start("grpo", steps=40)
        now(20)
        line.update(step=10, reward=0.5321, tokens_per_s=812.4, waiting_for="14 of 64 rollouts")

    drawn = on_terminal(use).split("\r\x1b[K")
    assert drawn[1:] == [
        "grpo 0/40",
        "grpo 10/40 · reward 0.532 · 812 tok/s · ETA 1:00 · waiting for 14 of 64 rollouts",
        "grpo 10/40 · reward 0.532 · 812 tok/s · waiting for 14 of 64 rollouts\r\n",
    ]


def test_a_line_never_wraps(now: Callable[[float], None]) -> None:
    text = on_terminal(lambda line: line.start("a phase with a very long name indeed"), columns=20)
    assert text.split("\r\x1b[K")[1] == "a phase with a very"


def test_a_note_is_printed_above_the_line(now: Callable[[float], None]) -> None:
    def use(line: Progress) -> None:
        line.start("sft")
        line.note("saved step 3")

    assert "\r\x1b[Ksaved step 3\r\nsft 0\r" in on_terminal(use)


def test_a_file_gets_lines_at_intervals(tmp_path: Path, now: Callable[[float], None]) -> None:
    path = tmp_path / "log"
    with path.open("w") as stream, Progress(stream, every_s=10) as line:
        line.start("grpo", steps=2)
        line.update(waiting_for="rollouts")  # too soon
        now(11)
        line.update(waiting_for="the update")
        line.update(step=1)  # a step is always said
        line.note("saved")
    assert path.read_text().splitlines() == [
        "grpo 0/2",
        "grpo 0/2 · waiting for the update",
        "grpo 1/2 · ETA 0:11 · waiting for the update",
        "saved",
        "grpo 1/2 · waiting for the update",
    ]


def test_a_resumed_phase_estimates_from_the_steps_of_this_process(tmp_path: Path, now: Callable[[float], None]) -> None:
    path = tmp_path / "log"
    with path.open("w") as stream, Progress(stream) as line:
        line.start("grpo", step=30, steps=40)
        now(60)
        line.update(step=31)
    assert "grpo 31/40 · ETA 9:00\n" in path.read_text()


def test_a_closed_terminal_does_not_stop_the_training() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    with Progress(stream) as line:
        line.start("grpo")
    with pytest.raises(BrokenPipeError):
        stream.close()  # what could not be written is still in its buffer


def test_updates_from_many_threads_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("w") as stream, Progress(stream, every_s=0) as line:
        line.start("grpo")
        threads = [
            threading.Thread(target=lambda: [line.update(waiting_for="x" * 50) for _ in range(50)]) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(path.read_text().splitlines()[1:]) == {"grpo 0 · waiting for " + "x" * 50}


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (200, "3:20"), (3723, "1:02:03")])
def test_durations_are_formatted_as_a_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
