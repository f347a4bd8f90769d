"""Several processes of `agl runner`: what is said when they cannot be started."""

from pathlib import Path

import pytest

from agl.errors import RunnerError
from agl.runner.processes import RunnerProcesses


def test_processes_that_cannot_be_started_are_an_error(tmp_path: Path) -> None:
    processes = RunnerProcesses([], 1, drain_s=0.0, log=tmp_path / "no" / "log")
    with processes, pytest.raises(RunnerError, match="a runner cannot be started"):
        processes.wait()
