"""Programs that run beside a measurement."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def running_beside(commands: Sequence[Sequence[str]]) -> Iterator[None]:
    """Run `commands` during the block, and kill them after it."""
    processes = [subprocess.Popen(command) for command in commands]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
