"""Starts programs that end with this process, however it ends."""

import signal
import sys
from collections.abc import Sequence
from typing import Final

_START: Final = """
import ctypes, os, resource, sys
number, memory = int(sys.argv[1]), int(sys.argv[2])
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, number)
if memory:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
os.execvp(sys.argv[3], sys.argv[3:])
"""
"""Linux sends the signal when the thread that started the program has ended (PR_SET_PDEATHSIG is 1)."""


def child_command(
    command: Sequence[str], *, at_end: signal.Signals = signal.SIGKILL, memory_bytes: int = 0
) -> list[str]:
    """`command` so that it gets the signal `at_end` when this process has ended (on Linux), with a limit of the memory
    that each of its processes may reserve; 0: no limit. Unlike `preexec_fn`, this is safe in a process with threads.
    """
    return [sys.executable, "-I", "-S", "-c", _START, str(int(at_end)), str(memory_bytes), *command]
