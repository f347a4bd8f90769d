"""Keeps several processes of `agl runner` running."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Final, Self

from agl.errors import RunnerError
from agl.runner.child import child_command

logger = logging.getLogger(__name__)

_CANNOT_RUN: Final = RunnerError.exit_code
"""Exit code of a runner that would end again."""
_LOOK_S, _STOP_S = 0.2, 10.0
_MANY, _MANY_IN_S = 5, 60.0
"""So many processes that end in this time are no accident."""
_LAST_LINES: Final = 5


class RunnerProcesses:
    """`count` processes of `command` (the arguments after `agl runner`). Use as a context manager.

    A process that is killed is replaced. At the end each gets SIGTERM, and SIGKILL if it has not ended `drain_s` and
    some seconds later. Their standard error goes to `log`, or where that of this process goes.
    """

    def __init__(self, command: Sequence[str], count: int, *, drain_s: float, log: Path | None = None) -> None:
        self._command = [sys.executable, "-m", "agl", "runner", *command]
        self._count = count
        self._drain_s = drain_s
        self._log = log
        self._stop = threading.Event()
        self._error: str | None = None
        self._ends: list[float] = []
        self.running: list[subprocess.Popen[bytes]] = []
        # The thread that starts the processes lives as long as they may: see `child_command`.
        self._thread = threading.Thread(target=self._watch, name="agl runners", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Have the processes drain; a second call has them give back at once what runs. For signal handlers, too."""
        if self._stop.is_set():
            for process in self.running:
                process.terminate()
        self._stop.set()

    def check(self) -> None:
        """Raises RunnerError if the processes cannot run."""
        if self._error is not None:
            raise RunnerError(self._error)

    def wait(self) -> None:
        """Until `stop`. Raises RunnerError as `check`."""
        while self._thread.is_alive() and self._error is None:
            self._thread.join(_LOOK_S)
        self.check()

    def _watch(self) -> None:
        try:
            self._keep_running()
        except OSError as error:
            self._error = f"a runner cannot be started: {error}"
        for process in self.running:
            process.terminate()
        deadline = time.monotonic() + self._drain_s + _STOP_S
        for process in self.running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _keep_running(self) -> None:
        while len(self.running) < self._count:
            self.running.append(self._start())
        while not self._stop.wait(_LOOK_S) and self._error is None:
            for index, process in enumerate(self.running):
                if (code := process.poll()) is not None:
                    self._note_end(process.pid, code)
                    self.running[index] = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C reaches this process, which ends the others in order.
        with self._log.open("ab") if self._log else nullcontext() as output:
            return subprocess.Popen(
                child_command(self._command, at_end=signal.SIGTERM),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _note_end(self, process_id: int, code: int) -> None:
        now = time.monotonic()
        self._ends = [*(end for end in self._ends if now - end < _MANY_IN_S), now]
        how = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
        logger.warning("runner %d ended %s; another takes its place, later its rollouts", process_id, how)
        if code == _CANNOT_RUN or len(self._ends) > _MANY:
            self._error = f"a runner ended {how}{self._last_lines()}"

    def _last_lines(self) -> str:
        if self._log is None:
            return "; its message is above"
        lines = self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        return f"; the end of {os.path.relpath(self._log)}:\n" + "\n".join(lines)
