"""A temporary PostgreSQL server on a free port. PostgreSQL refuses to run as root, so root runs it as another user."""

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import psycopg

from tests.ports import free_port
from tests.waiting import is_alive, wait_until

USER = "postgres"


class PostgresServer:
    """The constructor starts it. Without `durable` it never calls fsync, which is faster."""

    def __init__(self, *, durable: bool = False) -> None:
        # Outside pytest's temporary folder, which only its owner may enter.
        self.folder = Path(tempfile.mkdtemp(prefix="agl-postgres-"))
        if is_root():
            shutil.chown(self.folder, USER)
        self._options = [] if durable else ["-F"]
        self._port = free_port()
        self._databases = itertools.count()
        self._run("initdb", "-D", str(self.data), "-U", USER, "-A", "trust", "-E", "UTF8", "--locale", "C", "--no-sync")
        self.start()

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def start(self) -> None:
        command = [binary("postgres"), "-D", str(self.data), "-p", str(self._port), "-k", str(self.folder)]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "-h", "127.0.0.1", *self._options], stdout=log, stderr=log, cwd="/", user=runner()
            )
        wait_until(self._answers)

    def kill(self) -> None:
        """Kill every process of the server, as the kernel does when memory runs out. Returns once none is left."""
        self._process.send_signal(signal.SIGSTOP)  # So that it starts no further process.
        pids = self._pids()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self._process.wait()
        wait_until(lambda: not any(map(is_alive, pids)))

    def limit_files(self, size: int | Literal["unlimited"]) -> None:
        """Limit all files to `size` bytes, which simulates a full disk."""
        # The first process twice: the others include those that it started before its own limit applied.
        for pid in (self._process.pid, *self._pids()):
            # As the server's user: in a container even root may lack the right. Some processes may have ended.
            limit = ["prlimit", f"--fsize={size}:unlimited", "--pid", str(pid)]
            subprocess.run(limit, check=pid == self._process.pid, user=runner(), stderr=subprocess.DEVNULL)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGQUIT)  # Immediate shutdown: its files are deleted anyway.
        self._process.wait(30)
        shutil.rmtree(self.folder)

    def new_database(self) -> str:
        """URI of a new, empty database."""
        name = f"store_{next(self._databases)}"
        with psycopg.connect(self.uri("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.uri(name)

    def uri(self, database: str) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self._port}/{database}"

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.uri("postgres")).close()
        except psycopg.OperationalError:
            assert self._process.poll() is None, (self.folder / "log").read_text()[-2000:]
            return False
        return True

    def _pids(self) -> list[int]:
        """The main process, followed by the processes that it has started."""
        pid = self._process.pid
        return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]

    def _run(self, name: str, *arguments: str) -> None:
        done = subprocess.run([binary(name), *arguments], capture_output=True, text=True, cwd="/", user=runner())
        assert done.returncode == 0, done.stderr


@contextmanager
def running_postgres(*, durable: bool = False) -> Iterator[PostgresServer]:
    server = PostgresServer(durable=durable)
    try:
        yield server
    finally:
        server.stop()


def binary(name: str) -> str:
    """Path of a program of PostgreSQL. Debian installs each version into a folder that is not on PATH."""
    found = shutil.which(name) or max(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), default=None)
    assert found is not None, f"the tests need PostgreSQL's {name}: run `make servers`"
    return found


def is_root() -> bool:
    return os.geteuid() == 0


def runner() -> str | None:
    """User that runs the server. None: the user who runs the tests."""
    return USER if is_root() else None
