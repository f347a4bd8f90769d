"""The actor that runs a process of `agl` on a machine of the cluster."""

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import urllib3

from agl.runner.child import child_command
from agl.runner.run_id import RUN_FILE, run_of
from agl_trainer.engine.vllm.launch import free_port

CONFIG: Final = "{config}"
"""The word of a command in whose place the path of the configuration goes."""
_HEALTH_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker is to run: the words after `agl`, the text of the configuration, and variables."""

    words: tuple[str, ...]
    config: str
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class State:
    """What a worker runs."""

    job: Job | None
    """None: nothing since its actor was made, which Ray does again if it died."""
    code: int | None = None
    """Exit code of the process, or -N for signal N; None while it runs."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a training's servers are, and where its processes meet."""

    host: str
    api_port: int
    otlp_port: int
    meeting_port: int

    @property
    def api_url(self) -> str:
        return f"http://{self.host}:{self.api_port}"

    @property
    def otlp_url(self) -> str:
        return f"http://{self.host}:{self.otlp_port}"


class Worker:
    """Runs one process at a time, in the folder `folder` if this machine has it. The process ends with the actor."""

    def __init__(self, name: str, folder: str) -> None:
        self._name = name
        self._folder = folder if Path(folder).is_dir() else None
        self._job: Job | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ports = (free_port(), free_port(), free_port())

    def __repr__(self) -> str:
        """What Ray writes before each line of the process."""
        return self._name

    def address(self, host: str | None) -> Address:
        """For the training of this worker: on `host`, by default on the machine's address in the cluster."""
        if host is None:
            from ray.util import get_node_ip_address

            host = str(get_node_ip_address())
        return Address(host, *self._ports)

    def start(self, job: Job) -> None:
        """Run `job`, in the place of what runs."""
        self.stop(0.0)
        file = Path(tempfile.mkdtemp(prefix="agl-")) / "agl.yaml"
        file.touch(0o600)
        file.write_text(job.config, encoding="utf-8")
        words = [str(file) if word == CONFIG else word for word in job.words]
        command = child_command([sys.executable, "-m", "agl", *words], at_end=signal.SIGKILL)
        environment = {**os.environ, **job.variables}
        self._process = subprocess.Popen(command, cwd=self._folder, env=environment, start_new_session=True)
        self._job = job

    def state(self) -> State:
        return State(self._job, self._process.poll() if self._process else None)

    def serving(self, address: Address, output_dir: str) -> str | None:
        """The id of the run in `output_dir` once its training answers at `address`; None until then."""
        folder = Path(self._folder or ".") / output_dir
        with suppress(urllib3.exceptions.HTTPError):
            urllib3.request("GET", f"{address.api_url}/api/health", timeout=_HEALTH_S, retries=False)
            return run_of(folder) if (folder / RUN_FILE).exists() else None
        return None

    def stop(self, grace_s: float) -> None:
        """End the process: at once, or by SIGTERM first if it has `grace_s` seconds."""
        if self._process is None:
            return
        with suppress(subprocess.TimeoutExpired):
            if grace_s:
                self._process.terminate()
            self._process.wait(grace_s)
        self._process.kill()
        self._process.wait()
