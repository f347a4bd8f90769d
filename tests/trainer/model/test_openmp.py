"""Releasing OpenMP workers: with more workers than cores, they would sleep after every operation."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from agl_trainer.model.cpu.openmp import release_openmp_workers


def compute() -> None:
    torch.randn(512, 512) @ torch.randn(512, 512)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_released_workers_have_ended() -> None:
    found: list[int] = []

    def work() -> None:
        found.append(threads())
        for _ in range(2):
            compute()
            found.append(threads())
            release_openmp_workers()
            found.append(threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    alone, *rest = found
    assert rest == [alone + torch.get_num_threads() - 1, alone] * 2


SPINS = "GOMP_SPINCOUNT"
WARNS = "from agl_trainer.model.cpu.openmp import warn_if_workers_spin; warn_if_workers_spin()"
TOO_LATE = "torch was imported before agl_trainer, so its idle threads spin"


@pytest.mark.parametrize(
    ("code", "own", "expected", "is_warned"),
    [
        ("import agl_trainer", {}, "5000", False),
        ("import agl_trainer", {SPINS: "7"}, "7", False),
        ("import agl_trainer", {"OMP_WAIT_POLICY": "active"}, "None", False),
        ("import torch, agl_trainer", {}, "None", True),
        ("import torch, agl_trainer", {SPINS: "7"}, "7", False),
    ],
)
def test_idle_workers_sleep_soon_unless_the_user_decides(
    code: str, own: dict[str, str], expected: str, is_warned: bool
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in (SPINS, "OMP_WAIT_POLICY")} | own
    command = [sys.executable, "-c", f"import os; {code}; print(os.environ.get('{SPINS}')); {WARNS}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
    assert (TOO_LATE in done.stderr) == is_warned
