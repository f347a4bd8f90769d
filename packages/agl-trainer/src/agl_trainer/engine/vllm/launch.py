"""Starts `vllm serve` with what a training needs, and ends it with the training."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import urllib3

from agl.config import LaunchConfig
from agl.errors import ConfigError, TrainingError
from agl.runner.child import child_command
from agl.server.app_thread import base_url

_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for `--max-lora-rank`."""
_ENVIRONMENT: Final = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_ENFORCE_STRICT_TOOL_CALLING": "0",  # it would mask tokens, which a policy gradient does not know
}
_SLEEP_ENVIRONMENT: Final = {"VLLM_SERVER_DEV_MODE": "1"}
"""With it, vLLM has /sleep and /wake_up."""
_LAST_LINES, _STOP_S, _POLL_S = 20, 30.0, 0.5


def vllm_program(launch: LaunchConfig) -> str:
    """Path of the program. Raises ConfigError if there is none."""
    if found := shutil.which(launch.program):
        return found
    raise ConfigError(
        f"engine.launch.program: no program {launch.program}; pip install vllm, or name that of another environment"
    )


def serve_command(
    launch: LaunchConfig,
    model: Path,
    name: str,
    *,
    port: int,
    host: str = "127.0.0.1",
    max_model_len: int,
    ranks: Sequence[int],
    versions: int,
    chat_template: str | None,
) -> list[str]:
    """`vllm serve` of the base model in `model` as `name`.

    `ranks`: `lora_r` of each adapter; `versions`: how many of each are loaded at a time. Raises ConfigError.
    """
    rank = next((rank for rank in _RANKS if rank >= max(ranks)), None)
    if rank is None:
        raise ConfigError(f"agent_roles: vLLM has adapters up to rank {_RANKS[-1]}, and lora_r is {max(ranks)}")
    options: dict[str, object] = {
        "--served-model-name": name,
        "--host": host,
        "--port": port,
        "--dtype": launch.dtype,
        "--max-model-len": max_model_len,
        "--gpu-memory-utilization": launch.gpu_memory_utilization,
        "--max-lora-rank": rank,
        "--max-loras": len(ranks) * versions + 1,  # and one that is amplified for its proof
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",  # no sampling limits of the model's own, as in the in-process engine
    }
    if chat_template is not None:
        options["--chat-template"] = chat_template
    flags = ["--enable-lora", *(["--enable-sleep-mode"] if launch.sleep else [])]
    listed = [str(part) for option in options.items() for part in option]
    return [vllm_program(launch), "serve", str(model), *listed, *flags, *launch.options]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def url_of(port: int, host: str = "127.0.0.1") -> str:
    """Base URL of a server that listens on `port`."""
    return f"{base_url(host, port, None)}/v1"


@dataclass(frozen=True, slots=True)
class RunningVllm:
    """A `vllm serve` that this process has started."""

    url: str
    """Its base URL, which ends in `/v1`."""
    process: subprocess.Popen[bytes]
    log: Path

    def check(self) -> None:
        """Raises TrainingError with the last lines of the log if it has ended."""
        if self.process.poll() is not None:
            raise TrainingError(
                f"vLLM ended with exit code {self.process.returncode}; the end of {self.log}:\n{last_lines(self.log)}"
            )


@contextmanager
def running_vllm(
    command: Sequence[str],
    launch: LaunchConfig,
    port: int,
    log: Path,
    on_wait: Callable[[], None],
    host: str = "127.0.0.1",
) -> Iterator[RunningVllm]:
    """Run `command`; yields it once it answers, and ends it afterwards.

    `on_wait` is called now and then until then. Raises TrainingError with the last lines of `log` if the program does
    not answer, or ends: also if it ends within the context, in the place of the TrainingError that this causes there.
    """
    given = {name: value.get_secret_value() for name, value in launch.environment.items()}
    environment = {**os.environ, **_ENVIRONMENT, **(_SLEEP_ENVIRONMENT if launch.sleep else {}), **given}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            child_command(command, at_end=signal.SIGTERM),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the training, which ends vLLM
        )
    vllm = RunningVllm(url_of(port, host), process, log)
    try:
        _wait(vllm, f"{base_url(host, port, None)}/health", launch.timeout_s, on_wait)
        yield vllm
    except TrainingError:
        vllm.check()
        raise
    finally:
        _stop(process)


def _wait(vllm: RunningVllm, url: str, timeout_s: float, on_wait: Callable[[], None]) -> None:
    started = time.monotonic()
    while time.monotonic() - started < timeout_s:
        on_wait()
        vllm.check()
        try:
            if urllib3.request("GET", url, timeout=_POLL_S * 10, retries=False).status == 200:
                return
        except urllib3.exceptions.HTTPError:
            pass
        time.sleep(_POLL_S)
    raise TrainingError(
        f"vLLM did not answer within {timeout_s:g} s (engine.launch.timeout_s); the end of {vllm.log}:\n"
        f"{last_lines(vllm.log)}"
    )


def last_lines(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process in order within a grace period, then whatever is left of all that it has started."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
