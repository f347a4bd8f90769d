"""Progress, on a real pseudo-terminal and in a file."""

import errno
import fcntl
import logging
import os
import pty
import re
import struct
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agl_trainer.report import progress
from agl_trainer.report.progress import Progress, ProgressState, clock

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock of the progress."""
    time = [1000.0]
    monkeypatch.setattr(progress, "monotonic", lambda: time[0])  # not of `time`: threads of others wait by that
    return lambda seconds: time.__setitem__(0, 1000.0 + seconds)


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Output of a use of the progress on a pseudo-terminal of a width."""

    def output(use: Callable[[Progress], None], columns: int = 100, **environment: str) -> str:
        for name, value in {"TERM": "xterm-256color", "COLUMNS": str(columns), **environment}.items():
            monkeypatch.setenv(name, value)
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        with os.fdopen(theirs, "w") as stream, Progress(stream) as shown:
            use(shown)
        return b"".join(_read_all(ours)).decode()

    return output


def _read_all(terminal: int) -> Iterator[bytes]:
    """Read until the other side closes, which a terminal signals by an error; data may arrive in pieces."""
    try:
        while piece := os.read(terminal, 65536):
            yield piece
    except OSError as error:
        assert error.errno == errno.EIO
    finally:
        os.close(terminal)


def rows(output: str) -> list[str]:
    """Rows that were drawn, without spinner and controls; a row that was drawn again at once counts once."""
    drawn = [CONTROL.sub("", row).strip() for row in re.split(r"\n|\x1b\[2K", output)]
    plain = [re.sub(r"^[\u2800-\u28ff]\s+", "", row) for row in drawn if row]
    return [row for number, row in enumerate(plain) if number == 0 or row != plain[number - 1]]


def a_training(shown: Progress, now: Callable[[float], None]) -> None:
    with shown.phase("loading smollm2"):
        shown.note("a note")
    with shown.phase("grpo", steps=40):
        now(20)
        shown.update(step=10, reward=0.5321, tokens_per_s=812.4, waiting_for="14 of 64 rollouts")
        shown.show_cpu_share(0.6)
        now(21)
        shown.note("another")
        shown.update(step=40, waiting_for=None)
        now(80)


def test_a_terminal_has_a_bar_and_keeps_a_line_of_each_finished_phase(
    now: Callable[[float], None], on_terminal: Callable[..., str]
) -> None:
    details = "reward 0.532 · cpu shared: 60 % · waiting for 14 of 64 rollouts · 812 tok/s"
    wanted = [
        "loading smollm2 0:00",
        "a note",
        "loading smollm2 0:00",
        f"grpo 0/40 {'━' * 17} 0:00",
        f"grpo 10/40 ━━━━╺{'━' * 12} 0:21, 0:59 left {details}",
        "another",
        "grpo 40/40 · reward 0.532 · 1:20",
    ]
    drawn = rows(on_terminal(lambda shown: a_training(shown, now), columns=140))
    others = iter(drawn)  # It may have been drawn at other times too.
    assert all(row in others for row in wanted), drawn


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_a_row_never_wraps_and_has_a_bar_where_it_fits(
    columns: int, now: Callable[[float], None], on_terminal: Callable[..., str]
) -> None:
    drawn = rows(on_terminal(lambda shown: a_training(shown, now), columns=columns))
    bar = drawn[drawn.index("another") - 1]
    assert "0:21, 0:59" in bar and bar.endswith("…") and len(bar) < columns
    assert ("━" in bar) == (columns == 80)


def test_without_colours_and_on_a_terminal_without_controls(
    now: Callable[[float], None], on_terminal: Callable[..., str]
) -> None:
    colour = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|9[0-7])[;m]")
    assert colour.search(on_terminal(lambda shown: a_training(shown, now)))
    assert not colour.search(on_terminal(lambda shown: a_training(shown, now), NO_COLOR="1"))
    assert "\x1b" not in on_terminal(lambda shown: a_training(shown, now), TERM="dumb")


def test_logs_are_printed_above_the_bar(
    now: Callable[[float], None], on_terminal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = logging.StreamHandler()
    monkeypatch.setattr(logging.root, "handlers", [handler])
    before = handler.stream

    def use(shown: Progress) -> None:
        with shown.phase("sft", steps=2):
            shown.note("a note")
            logging.getLogger("some.library").warning("a warning")

    assert "a warning" in rows(on_terminal(use))
    assert handler.stream is before


def test_a_file_gets_a_line_per_phase_and_interval_and_none_per_step(
    tmp_path: Path, now: Callable[[float], None]
) -> None:
    path = tmp_path / "log"
    with path.open("w") as stream, Progress(stream, every_s=10) as shown:
        with shown.phase("loading tiny"):
            pass
        with shown.phase("evaluating base", steps=64):
            for step in range(64):
                shown.update(step=step + 1)
            shown.update(reward=0.25)
        with shown.phase("grpo", steps=3):
            now(11)
            shown.update(step=1, waiting_for="the update")
            now(20)
            shown.update(step=2)  # too soon
            shown.note("saved")
            shown.update(step=3, reward=0.5)
    assert path.read_text().splitlines() == [
        "loading tiny",
        "evaluating base",
        "evaluating base 64/64 · reward 0.250 · 0:00",
        "grpo",
        "grpo 1/3 · 0:11, 0:22 left · waiting for the update",
        "saved",
        "grpo 3/3 · reward 0.500 · 0:20",
    ]


def test_a_phase_within_a_phase_leaves_the_outer_one_as_it_was(tmp_path: Path, now: Callable[[float], None]) -> None:
    path = tmp_path / "log"
    with path.open("w") as stream, Progress(stream) as shown, shown.phase("grpo", steps=2):
        now(20)
        shown.update(step=1)
        with shown.phase("evaluating step-00001", steps=4):
            shown.update(step=4, reward=0.1)
        now(40)
        shown.update(step=2)
    assert path.read_text().splitlines()[-2:] == ["grpo 2/2 · 0:40", "grpo 2/2 · 0:40"]


def test_a_phase_that_is_cut_short_leaves_no_result(tmp_path: Path) -> None:
    path = tmp_path / "log"
    interrupted = pytest.raises(KeyboardInterrupt)
    with interrupted, path.open("w") as stream, Progress(stream) as shown, shown.phase("sft", steps=4):
        shown.update(step=1)
        raise KeyboardInterrupt
    assert path.read_text() == "sft\n"


@pytest.mark.parametrize(
    ("first", "done", "began_s_ago", "step_began_s_ago", "left"),
    [
        (0, 0, 21, 21, None),  # the first step is unfinished
        (0, 10, 21, 1, 59.0),  # 2 s each: 30 steps of 2 s, less the second that the unfinished one has taken
        (0, 10, 25, 5, 58.0),  # it takes longer than the others: the 29 after it are left
        (30, 31, 60, 0, 540.0),  # resumed: only the steps of this process count
        (0, 40, 80, 0, None),
    ],
)
def test_the_time_left_counts_the_unfinished_step(
    first: int, done: int, began_s_ago: float, step_began_s_ago: float, left: float | None
) -> None:
    state = ProgressState("grpo", 100 - began_s_ago, 100 - step_began_s_ago, first, done, 40)
    assert state.left_s(100) == left


def test_a_closed_terminal_does_not_stop_the_training() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    with Progress(stream) as shown, shown.phase("grpo", steps=1):
        shown.update(step=1)
    with pytest.raises(BrokenPipeError):
        stream.close()  # what could not be written is still in its buffer


def test_updates_from_many_threads_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("w") as stream, Progress(stream, every_s=0) as shown, shown.phase("grpo"):
        shown.update(waiting_for="x" * 150)
        threads = [
            threading.Thread(target=lambda: [shown.update(waiting_for="x" * 150) for _ in range(50)]) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = path.read_text().splitlines()
    assert len(lines) == 402
    assert {re.sub(r"\d+:\d+", "0:00", line) for line in lines[1:]} == {"grpo · 0:00 · waiting for " + "x" * 150}


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (200, "3:20"), (3723, "1:02:03")])
def test_durations_are_formatted_as_a_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
