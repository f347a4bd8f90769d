"""The output folder of a training: the lock that keeps a second training out, and the id of the run in it."""

import fcntl
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from agl.errors import TrainingError
from agl.page.runs import RunState
from agl.runner.run_id import RUN_FILE, run_of
from agl.store import Resource, Store

_held: set[TextIO] = set()


@contextmanager
def locked(folder: Path, holder: str = "another training") -> Iterator[None]:
    """Hold the lock of `folder`, which the system releases when the process ends, however it ends.

    `holder` says to others who has it. Raises TrainingError with the holder, its process id and host if another process
    has it, or if it cannot be written.
    """
    with _opened_lock(folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            other, _, process = file.read().partition(": ")
            raise TrainingError(
                f"{other or 'another process'} runs in {folder} ({process or 'it is just starting'}); stop it, or "
                "choose another train.output_dir"
            ) from error
        file.truncate(0)
        file.write(f"{holder}: process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)


def _opened_lock(folder: Path) -> TextIO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise TrainingError(
            f"cannot write to {folder} ({error.filename}: {error.strerror}); choose another train.output_dir"
        ) from error


def _close_in_child() -> None:
    """A forked child would keep the lock after the training crashed."""
    for file in _held:
        file.close()


os.register_at_fork(after_in_child=_close_in_child)


def claim_run(folder: Path, store: Store) -> str:
    """`run_of(folder)`, with a suffix if `store` already has a run of this id. The folder keeps the id."""
    file, run = folder / RUN_FILE, run_of(folder)
    if not file.exists():
        claim = Resource(
            f"run {run}", 0, str(folder.resolve()), {"token": secrets.token_hex(8), "made_ns": time.time_ns()}
        )
        if store.add_resource(claim).metadata != claim.metadata:
            run = f"{run[:57]}-{secrets.token_hex(3)}"
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(run, encoding="utf-8")
    return run


def set_state(store: Store, run: str, state: RunState) -> None:
    """Record in the store how far `run` is. One that is killed stays as it was."""
    claim = store.get_resource(f"run {run}")
    if claim is not None:  # A run that an earlier version began may have none.
        store.put_resource(replace(claim, metadata={**claim.metadata, "state": state}))


def adapter_name(run: str, role: str) -> str:
    """Name of the store's resource whose versions are the adapters that `run` published for `role`."""
    return f"{run}/{role}"
