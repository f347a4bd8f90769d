"""Several processes of `agl runner`: what is said when they cannot be started, and how they stop."""

import sys
from pathlib import Path

import pytest

from agl.errors import RunnerError
from agl.runner.processes import RunnerProcesses
from tests.waiting import wait_until


def test_processes_that_cannot_be_started_are_an_error(tmp_path: Path) -> None:
    processes = RunnerProcesses([], 1, drain_s=0.0, log=tmp_path / "no" / "log")
    with processes, pytest.raises(RunnerError, match="a runner cannot be started"):
        processes.wait()


DRAINS = """
import signal, sys, time

def drain(*_):
    if seen:
        sys.exit()
    seen.append(1)
    print("drains", file=sys.stderr, flush=True)

seen = []
signal.signal(signal.SIGTERM, drain)
print("runs", file=sys.stderr, flush=True)
time.sleep(600)
"""


def test_a_second_stop_reaches_the_processes_too(tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = RunnerProcesses([], 2, drain_s=600.0, log=log)
    processes._command = [sys.executable, "-c", DRAINS]
    with processes:
        wait_until(lambda: log.exists() and log.read_text().count("runs") == 2)
        processes.stop()
        wait_until(lambda: log.read_text().count("drains") == 2)
        processes.stop()
        wait_until(lambda: [process.poll() for process in processes.running] == [0, 0])
