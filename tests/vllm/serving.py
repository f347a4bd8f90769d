"""Runs a real vLLM server on the CPU."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.ports import free_port
from tests.vllm.environment import vllm_program

START_S = 600
_OPTIONS = ("--dtype", "float32", "--max-model-len", "1024", "--host", "127.0.0.1")
_ADAPTERS = ("--enable-lora", "--max-lora-rank", "16", "--max-loras", "4", "--logprobs-mode", "processed_logprobs")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3600",  # on a busy machine a pass may take minutes
}


@contextmanager
def serve_vllm(model: Path, name: str, log: Path, *, adapters: bool = True) -> Iterator[str]:
    """Start vLLM; yields its base URL, which ends in `/v1`, once it answers (after a minute or two), and stops it."""
    port = free_port()
    options = [*_OPTIONS, *(_ADAPTERS if adapters else ())]
    command = [str(vllm_program()), "serve", str(model), "--served-model-name", name, "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *options],
            env=os.environ | ENVIRONMENT | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_healthy(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"vLLM ended with {process.returncode}:\n{log.read_text()[-3000:]}")
        try:
            if httpx.get(url, timeout=5).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise TimeoutError(f"vLLM did not answer within {START_S} s:\n{log.read_text()[-3000:]}")
