"""Ctrl-C and SIGTERM in a terminal, in the middle of 32 rollouts: one line, no traceback, and the training resumes."""

import os
import pty
import signal
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pyte
import pytest

from agl.store import RolloutState, open_store
from tests.flows.test_training import TOY, config_in

LONG: dict[str, Any] = {"group_size": 8, "groups_per_step": 4, "steps": 1, "max_tokens": 1500, "timeout_s": 300}


class Terminal:
    """A command in a pseudo-terminal, and what it has printed there."""

    def __init__(self, command: list[str]) -> None:
        self.pid, self._end = pty.fork()
        if self.pid == 0:
            os.execv(command[0], command)
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
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._reader.join(5)
        os.close(self._end)
        return code


def start_and_wait_for_rollouts(folder: Path, **train: Any) -> Terminal:
    config = config_in(folder, **LONG | train)
    config = config.model_copy(
        update={"engine": config.engine.model_copy(update={"max_batch": 32, "max_model_len": 1600})}
    )
    (folder / "config.yaml").write_text(config.to_yaml())
    terminal = Terminal([str(Path(sys.executable).with_name("agl")), "train", str(folder / "config.yaml")])
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
def test_a_training_that_is_stopped_says_so_in_one_line(tmp_path: Path, sends: str, train: dict[str, Any]) -> None:
    terminal = start_and_wait_for_rollouts(tmp_path, **train)
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
