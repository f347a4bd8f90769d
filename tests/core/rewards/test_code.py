"""Code by its tests, in a real sandbox: what passes, what cheats, and what would harm the machine."""

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from agl.errors import RewardError
from agl.rewards.code import CodeTests
from agl.rewards.sandbox import Sandbox, SandboxLimits
from tests.waiting import wait_until

LIMITS = SandboxLimits(wall_s=20.0, cpu_s=10, memory_mb=256)
TASK = {"tests": ["assert add(2, 3) == 5", "assert add(-1, 1) == 0"]}
ADD = "def add(a, b):\n    return a + b\n"


@pytest.mark.parametrize("kind", ["bubblewrap", "rlimits"])
@pytest.mark.parametrize(
    ("answer", "runs", "tests"),
    [
        (f"Here it is:\n```python\n{ADD}```", 1.0, 1.0),
        ("```python \r\ndef add(a, b):\r\n    return abs(a) + abs(b)\r\n```", 1.0, 0.5),
        ("import os\ndef add(a, b):\n    os._exit(0)", 1.0, 0.0),
        ("def add(a, b): return", 1.0, 0.0),
        (f"x = bytearray(1 << 30)\n{ADD}", 0.0, 0.0),
        ("def add(a, b)", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_code_earns_what_its_tests_say(kind: str, answer: str, runs: float, tests: float) -> None:
    assert CodeTests(sandbox=kind, limits=LIMITS)(TASK, answer) == {"runs": runs, "tests": tests}  # type: ignore[arg-type]


def test_the_sandbox_has_no_network_no_files_of_ours_and_nothing_is_left_behind(tmp_path: Path) -> None:
    sandbox = Sandbox(limits=LIMITS)
    secret = tmp_path / "secret"
    secret.write_text("s3cret", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
        assert (sandbox.run(connect).code, Sandbox("rlimits", LIMITS).run(connect).code) == (1, 0)
    assert "FileNotFoundError" in sandbox.run(f"open({str(secret)!r})").error
    assert sandbox.run("import os; raise SystemExit(len(os.environ) > 8 or os.getppid() > 3)").code == 0
    assert sandbox.run("open('/tmp/left', 'w')").code == 0
    assert sandbox.run("import os; raise SystemExit(os.path.exists('/tmp/left'))").code == 0
    assert sandbox.run("open('/usr/left', 'w')").code == 1
    assert sandbox.run("open('/tmp/large', 'wb').write(bytes(64 << 20))").code != 0


def test_the_time_limit_ends_every_process() -> None:
    mark = f"600.{os.getpid()}"
    spawn = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    os.execv("/bin/sleep", ["sleep", "{mark}"])
time.sleep(600)
"""
    sandbox = Sandbox(limits=LIMITS)
    sandbox.limits = SandboxLimits(wall_s=2.0)  # Not that of the script that tries the sandbox.
    assert sandbox.run(spawn).code is None
    wait_until(lambda: not any(mark in line for line in command_lines()))


def command_lines() -> Iterator[str]:
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # It has ended.
            yield file.read_text(errors="replace")


def test_without_bubblewrap_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RewardError, match="apt-get install bubblewrap, or pass sandbox='rlimits'"):
        CodeTests()
    refusing = tmp_path / "bwrap"
    refusing.write_text(
        "#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2; exit 1\n", encoding="utf-8"
    )
    refusing.chmod(0o755)
    with pytest.raises(RewardError, match=r"\(bwrap: No permissions to create new namespace\): allow user namespaces"):
        CodeTests()
    with pytest.raises(RewardError, match="expected bubblewrap or rlimits"):
        CodeTests(sandbox="docker")  # type: ignore[arg-type]


def test_a_task_without_tests_is_an_error() -> None:
    with pytest.raises(RewardError, match="the task has no tests"):
        CodeTests(sandbox="rlimits", limits=LIMITS)({"tests": []}, ADD)
