"""A PostgreSQL server of the tests' own: a throw-away cluster on a free port, not run by root, which it refuses."""

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
    """Started when made. Without `durable` it keeps nothing when the machine fails, and is the faster for it."""

    def __init__(self, *, durable: bool = False) -> None:
        # Not in pytest's folder, which only its owner may enter.
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
        """SIGKILL for every process of the server, as when memory runs out; returns when none is left."""
        self._process.send_signal(signal.SIGSTOP)  # So that it starts no more.
        pids = self._pids()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self._process.wait()
        wait_until(lambda: not any(map(is_alive, pids)))

    def limit_files(self, size: int | Literal["unlimited"]) -> None:
        """Let no file grow beyond `size` bytes, as if the disk were full."""
        for pid in (self._process.pid, *self._pids()):  # The first again: what it started meanwhile is among the rest.
            # As the server's user: even root may not be let to do it to another's. A process may have ended by now.
            limit = ["prlimit", f"--fsize={size}:unlimited", "--pid", str(pid)]
            subprocess.run(limit, check=pid == self._process.pid, user=runner(), stderr=subprocess.DEVNULL)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGQUIT)  # At once: what it would write is deleted anyway.
        self._process.wait(30)
        shutil.rmtree(self.folder)

    def new_database(self) -> str:
        """URI of another, empty database."""
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
        """The first starts the others, and comes first."""
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
    """Where a program of the server lies; Debian keeps those of each version apart."""
    found = shutil.which(name) or max(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), default=None)
    assert found is not None, f"the tests need PostgreSQL's {name}: run `make servers`"
    return found


def is_root() -> bool:
    return os.geteuid() == 0


def runner() -> str | None:
    """The user that the server runs as; None: the one who runs the tests."""
    return USER if is_root() else None
