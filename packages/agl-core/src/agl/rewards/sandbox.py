"""Runs Python code that nobody has read, in a process that has no network, sees no files of ours, and is limited.

`bubblewrap` (Debian's package of that name, program `bwrap`) gives it namespaces of its own: of processes, users,
mounts and network. `rlimits` has the limits only: code then sees the files and the network of this process, and its
processes survive if they leave their process group.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from agl.errors import RewardError

SandboxKind = Literal["bubblewrap", "rlimits"]

_WITHOUT: Final = "or pass sandbox='rlimits', which limits time and memory but shows files and network to the code"
_PYTHON: Final = os.path.realpath(sys.executable)
"""The interpreter without a virtual environment: code gets the standard library."""
_FOLDERS: Final = ("/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
_OUTPUT_BYTES: Final = 1_000_000
_LAUNCH: Final = """
import os, resource, sys
for name, limit in zip(("AS", "CPU", "NPROC", "FSIZE", "CORE", "NOFILE"), map(int, sys.argv[1:7])):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
os.execv(sys.executable, [sys.executable, "-I", "-B", sys.argv[7]])
"""
"""Sets the limits in the sandbox and runs the script: a function that runs between fork and exec may deadlock."""


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """Limits of one sandbox."""

    wall_s: float = 10.0
    cpu_s: int = 10
    """Of each process."""
    memory_mb: int = 512
    """Address space of each process."""
    processes: int = 64
    file_mb: int = 16
    """Of each file, and of all files together with bubblewrap."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a script ended: its exit code, None after the time limit, and what it wrote."""

    code: int | None
    output: bytes
    error: str


class Sandbox:
    """Runs scripts, each in a fresh sandbox. Thread-safe."""

    def __init__(self, kind: SandboxKind = "bubblewrap", limits: SandboxLimits | None = None) -> None:
        """Raises RewardError if there is no such sandbox on this machine."""
        if kind not in ("bubblewrap", "rlimits"):
            raise RewardError(f"sandbox is {kind!r}, expected bubblewrap or rlimits")
        self.limits = limits or SandboxLimits()
        self._wrapper = shutil.which("bwrap") if kind == "bubblewrap" else None
        if kind == "bubblewrap" and self._wrapper is None:
            raise RewardError(f"bubblewrap is not installed: apt-get install bubblewrap, {_WITHOUT}")
        tried = self.run("pass")
        if tried.code != 0:
            advice = f"allow user namespaces (sysctl kernel.unprivileged_userns_clone=1), {_WITHOUT}"
            raise RewardError(
                f"the sandbox {kind} does not run here ({tried.error.strip()[-500:] or f'exit code {tried.code}'}): "
                + (advice if self._wrapper else "raise its limits")
            )

    def run(self, script: str, data: bytes = b"") -> Ended:
        """Run the Python `script` with `data` as its standard input. All its processes have ended on return."""
        limits = self.limits
        numbers = (limits.memory_mb << 20, limits.cpu_s, self._processes(), limits.file_mb << 20, 0, 256)
        with _folder() as folder, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            path = folder / "script.py"
            path.write_text(script, encoding="utf-8", errors="surrogateescape")
            inside = Path("/work/script.py") if self._wrapper else path
            command = [_PYTHON, "-I", "-S", "-c", _LAUNCH, *map(str, numbers), str(inside)]
            process = subprocess.Popen(
                [*self._wrapped(folder), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=errors,
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
                start_new_session=True,
            )
            try:
                process.communicate(data, timeout=limits.wall_s)
                code = process.returncode
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _kill(process)
            output.seek(0)
            errors.seek(0)
            return Ended(code, output.read(_OUTPUT_BYTES), errors.read(_OUTPUT_BYTES).decode(errors="replace"))

    def _processes(self) -> int:
        """The limit counts the processes of the user, of a namespace with bubblewrap, else of the whole machine."""
        return self.limits.processes + (0 if self._wrapper else _own_processes())

    def _wrapped(self, folder: Path) -> list[str]:
        """The command line in front of the one that the sandbox runs."""
        if self._wrapper is None:
            return []
        seen = dict.fromkeys(
            place for place in ("/usr", os.path.realpath(sys.base_prefix), *_FOLDERS) if Path(place).exists()
        )
        shown = [option for place in seen for option in ("--ro-bind", place, place)]
        space = ["--size", str(self.limits.file_mb << 20), "--tmpfs", "/tmp"]
        options = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        places = ["--proc", "/proc", "--dev", "/dev", *space, "--ro-bind", str(folder), "/work", "--chdir", "/tmp"]
        return [self._wrapper, *options, *shown, *places, "--"]


def _own_processes() -> int:
    """Number of processes and threads of this user, as RLIMIT_NPROC counts them."""
    user, total = os.getuid(), 0
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and entry.stat().st_uid == user:
                total += sum(1 for _ in (entry / "task").iterdir())
        except OSError:
            continue  # it has ended
    return total


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="agl-sandbox-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill the process group. Bubblewrap's namespace of processes ends with its first process."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
