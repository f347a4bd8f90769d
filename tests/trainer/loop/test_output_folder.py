"""The output folder of a training: one training at a time, and an id that no other run in the store has."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agl.cli.doctor import check_folder
from agl.config import Config
from agl.errors import TrainingError
from agl.runner.run_id import run_of
from agl.store import Store, open_store
from agl_trainer.loop.output_folder import claim_run, locked
from agl_trainer.loop.trainer import Trainer

HOLDER = """
import os, sys, time
from pathlib import Path
from agl_trainer.loop.output_folder import locked
with locked(Path(sys.argv[1])):
    if os.fork() == 0:
        print(os.getpid(), flush=True)  # by the child, which has closed the lock by now
    time.sleep(600)
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(f"sqlite:///{tmp_path / 'agl.db'}")
    yield store
    store.close()


def test_a_second_training_is_refused_with_the_first_ones_process_and_host(tmp_path: Path) -> None:
    message = (
        f"another training runs in .*run \\(process {os.getpid()} on {socket.gethostname()}\\); stop it, or choose"
    )
    with locked(tmp_path / "run"):
        with pytest.raises(TrainingError, match=message), locked(tmp_path / "run"):
            pass
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "run"):
        pass


def test_an_evaluation_with_vllm_is_refused_beside_a_training(tmp_path: Path) -> None:
    """It would unload the adapters that the training uses."""
    train = {"model": "tiny", "output_dir": str(tmp_path / "run")}
    config = Config.parse({"agent_roles": {"writer": {}}, "engine": "vllm", "train": train})
    with (
        locked(tmp_path / "run"),
        pytest.raises(TrainingError, match="another training runs in"),
        Trainer(config).open(trains=False),
    ):
        raise AssertionError
    with (
        locked(tmp_path / "run", "an evaluation"),
        pytest.raises(TrainingError, match=r"an evaluation runs in .*run \(process"),
        Trainer(config).open(),
    ):
        raise AssertionError


def test_a_folder_that_takes_no_file_is_named() -> None:
    """On the file systems of the kernel even root cannot write, and access rights do not show it."""
    advice = "choose another train.output_dir"
    check = check_folder("train.output_dir", Path("/proc/agl/run"), advice)
    assert not check.ok and check.todo.startswith("/proc cannot be written to (") and check.todo.endswith(f": {advice}")
    with pytest.raises(TrainingError, match=r"cannot write to /proc/agl/run .*; choose another train\.output_dir"):
        locked(Path("/proc/agl/run")).__enter__()


def test_a_killed_training_leaves_no_lock_behind_even_if_a_fork_of_it_lives(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(TrainingError, match=f"process {holder.pid} on"), locked(tmp_path):
            pass
        holder.kill()
        holder.wait()
        os.kill(child, 0)
        with locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_runs_of_equal_folder_names_in_one_store_have_different_ids(tmp_path: Path, store: Store) -> None:
    first, second = tmp_path / "a/run", tmp_path / "b/run"
    assert run_of(first) == claim_run(first, store) == "run"
    assert claim_run(second, store).startswith("run-")
    assert run_of(second) == claim_run(second, store) != claim_run(first, store) == "run"
    first.rename(tmp_path / "moved")
    assert claim_run(tmp_path / "moved", store) == "run"
    assert claim_run(first, store) not in ("run", run_of(second))
