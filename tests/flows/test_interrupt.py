"""Ctrl-C and SIGTERM in a terminal, in the middle of 32 rollouts: one line, no traceback, and the training resumes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyte
import pytest

from agl.store import RolloutState, open_store
from tests.flows.test_training import TOY, config_in

LONG: dict[str, Any] = {"group_size": 8, "groups_per_step": 4, "steps": 1, "max_tokens": 1500, "timeout_s": 300}


RUN_IN_TERMINALS = """
import fcntl, os, sys, termios
from agl.cli import main
from agl_trainer.loop import session  # What a training imports only when it runs, each child would import again.

for line in sys.stdin:
    terminal, *command = line.split()
    end = os.open(terminal, os.O_RDWR | os.O_NOCTTY)
    child = os.fork()
    if child == 0:
        os.setsid()
        fcntl.ioctl(end, termios.TIOCSCTTY, 0)
        for stream in range(3):
            os.dup2(end, stream)
        os.close(end)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
        sys.exit(main(command))
    os.close(end)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

Programs = subprocess.Popen[str]


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    """Runs `agl` in terminals, forked from a process that has loaded everything."""
    command = [sys.executable, "-c", RUN_IN_TERMINALS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


class Terminal:
    """`agl` with a command in a pseudo-terminal, and what it has printed there."""

    def __init__(self, programs: Programs, *command: str) -> None:
        assert programs.stdin is not None and programs.stdout is not None
        self._end, other = os.openpty()
        self._said = programs.stdout
        programs.stdin.write(" ".join([os.ttyname(other), *command]) + "\n")
        programs.stdin.flush()
        self.pid = int(self._said.readline())
        os.close(other)
        self.printed = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while piece := os.read(self._end, 4096):
                self.printed += piece
        except OSError:  # the other end is closed
            pass

    def lines(self, printed: int | None = None) -> list[str]:
        """What a person sees after all that was printed, or its first `printed` bytes."""
        screen = pyte.Screen(200, 50)
        screen.set_mode(pyte.modes.LNM)
        pyte.ByteStream(screen).feed(self.printed[:printed])
        return [line.strip() for line in screen.display if line.strip()]

    def has_ended(self) -> bool:
        return not self._reader.is_alive()

    def press_ctrl_c(self) -> None:
        os.write(self._end, b"\x03")

    def wait(self) -> int:
        code = int(self._said.readline())
        self._reader.join(5)
        os.close(self._end)
        return code


def start_and_wait_for_rollouts(programs: Programs, folder: Path, **train: Any) -> Terminal:
    config = config_in(folder, **LONG | train)
    config = config.model_copy(
        update={"engine": config.engine.model_copy(update={"max_batch": 32, "max_model_len": 1600})}
    )
    (folder / "config.yaml").write_text(config.to_yaml())
    terminal = Terminal(programs, "train", str(folder / "config.yaml"))
    with closing(open_store(config.store_uri)) as store:
        deadline = time.monotonic() + 120
        while store.count_rollouts()[RolloutState.RUNNING] < 32:
            assert time.monotonic() < deadline and not terminal.has_ended(), terminal.printed.decode()
            time.sleep(0.05)
    time.sleep(0.5)  # until the calls of the agents are being sampled
    return terminal


@pytest.mark.parametrize(
    ("sends", "train"),
    [
        ("ctrl-c", {}),
        ("SIGTERM", {}),
        ("ctrl-c", {"agent": f"{TOY}:async_answer"}),
        ("ctrl-c", {"asynchronous": True, "max_staleness": 1}),
        ("ctrl-c twice", {}),
    ],
)
def test_a_training_that_is_stopped_says_so_in_one_line(
    programs: Programs, tmp_path: Path, sends: str, train: dict[str, Any]
) -> None:
    terminal = start_and_wait_for_rollouts(programs, tmp_path, **train)
    before = len(terminal.printed)
    terminal.press_ctrl_c() if sends != "SIGTERM" else os.kill(terminal.pid, signal.SIGTERM)
    if sends == "ctrl-c twice":
        while b"at once" not in terminal.printed and not terminal.has_ended():
            time.sleep(0.01)
        terminal.press_ctrl_c()
    assert terminal.wait() == 130
    *earlier, last = [line for line in terminal.lines() if line != "^C" and "grpo 0/1" not in line]  # nor the bar
    assert last == "stopping; the same command resumes at the last checkpoint; Ctrl-C again ends at once"
    assert {*earlier} <= {*terminal.lines(before)}
    if sends != "ctrl-c twice":
        with closing(open_store(f"sqlite:///{tmp_path / 'agl.db'}")) as store:
            counts = store.count_rollouts()
        assert counts[RolloutState.CANCELLED] > 16 and counts[RolloutState.QUEUED] == counts[RolloutState.RUNNING] == 0
