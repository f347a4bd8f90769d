"""Latency and throughput of the gateway and of LiteLLM's proxy; 1,000 rollouts with open streams. Prints Markdown.

    .venv/bin/python -m benchmarks.gateway [--only latency|throughput|streams]

Engine, proxies and clients each have a process of their own. The engine (`null_engine`) costs next to nothing and
answers 16 tokens with ids and logprobs. Our gateway commits each call to a SQLite file before the call ends; LiteLLM
stores nothing.

- Added latency: 1, 32 or 256 calls at once, with a delay at the engine like that of sampling, sent directly and through
  the gateway in turn. The added latency is the difference between the percentiles. With an engine that answers
  immediately this would measure throughput, because 32 clients that never wait form a queue. On a virtual machine an
  idle core takes milliseconds to wake up, several times per call; `--awake` keeps each core busy with a process that
  yields to any other.
- Throughput: 32 clients and an engine that answers immediately.
- Streams: every rollout holds one stream open, all at the same time, wave after wave.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median

from agl import semconv
from agl.store import open_store
from agl.tokens.packing import unpack_ids
from benchmarks.background import running_beside
from benchmarks.http_load import number
from benchmarks.null_engine import prompt_ids, token_ids
from benchmarks.process import cpu_s, memory_mb
from tests.ports import free_port
from tests.venv import python_with

CONCURRENT = {1: 100, 32: 1000, 256: 1000}
"""Calls at once, and the time in ms that each takes at the engine."""
KINDS = {"whole": 1, "stream": 2}
"""Kind of answer, and how often the engine sleeps for its delay."""
PARTS = ("latency", "throughput", "streams")
LITELLM = "1.106.2"
_WITHOUT_KEY = "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"
_START_S = 120


@contextmanager
def running(command: Sequence[str | Path], url: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server and yield it once it answers at `url`. Kills it at the end."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | environment
    )
    try:
        deadline = time.monotonic() + _START_S
        while not answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise RuntimeError(f"{command[0]} does not answer at {url}")
            time.sleep(0.2)
        yield process
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


@contextmanager
def cores_awake() -> Iterator[None]:
    """Keep every core from sleeping with a process that runs only while the core is otherwise idle."""
    spin = "import os; os.sched_setaffinity(0, {%d}); os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))"
    commands = [[sys.executable, "-c", f"{spin % core}\nwhile True: pass"] for core in os.sched_getaffinity(0)]
    with running_beside(commands):
        yield


def engine_command() -> tuple[str, list[str]]:
    """Base URL of a null engine, and the command that starts it there."""
    port = free_port()
    return f"http://127.0.0.1:{port}/v1", [sys.executable, "-m", "benchmarks.null_engine", str(port)]


@contextmanager
def null_engine() -> Iterator[str]:
    url, command = engine_command()
    with running(command, f"{url}/models"):
        yield url


@contextmanager
def ours(folder: Path, engine: str) -> Iterator[tuple[str, subprocess.Popen[bytes], str]]:
    """`agl serve` in front of `engine`: base URL, process and store URI."""
    config, port = folder / "agl.yaml", free_port()
    store = f"sqlite:///{folder}/agl.db"
    settings = {"gateway": {"engines": [{"url": engine, "max_concurrent": 4096}]}, "store_uri": store}
    config.write_text(json.dumps(settings))
    agl = Path(sys.executable).with_name("agl")
    ports = ["--port", str(port), "--otlp-http-port", "0", "--otlp-grpc-port", "0"]
    url = f"http://127.0.0.1:{port}"
    with running([agl, "serve", "--config", config, *ports], f"{url}/api/health") as process:
        yield f"{url}/v1", process, store


@contextmanager
def litellm(folder: Path, engine: str) -> Iterator[str]:
    """Base URL of LiteLLM's proxy in front of `engine`, with no optional feature enabled."""
    python = python_with("litellm", f"litellm[proxy]=={LITELLM}", over_ours=False)
    config, port = folder / "litellm.json", free_port()
    parameters = {"model": "openai/null", "api_base": engine, "api_key": "none"}
    config.write_text(json.dumps({"model_list": [{"model_name": "null", "litellm_params": parameters}]}))
    url = f"http://127.0.0.1:{port}"
    command = [python.with_name("litellm"), "--config", config, "--port", str(port), "--host", "127.0.0.1"]
    with running(command, f"{url}/health/liveliness", LITELLM_LOG="ERROR", **{_WITHOUT_KEY: "true"}):
        yield f"{url}/v1"


def load(url: str, clients: int, calls: int, delay_ms: int, kind: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.http_load", url, str(clients), str(calls), str(delay_ms), kind]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the load failed: {done.stderr[-1000:]}")
    return json.loads(done.stdout)


def added_latency(direct: str, through: str, rounds: int) -> None:
    print("| answer | at once | p50 direct ms | p50 added ms | p99 direct ms | p99 added ms |")
    print("|---|---:|---:|---:|---:|---:|")
    for kind, waits in KINDS.items():
        for clients, call_ms in CONCURRENT.items():
            calls = max(4 * clients, 50)
            pairs = [
                tuple(load(url, clients, calls, call_ms // waits, kind) for url in (direct, through))
                for _ in range(rounds)
            ]
            cells = [
                f"{median(value):,.2f}"
                for at in ("p50", "p99")
                for value in ([one[at] for one, _ in pairs], [other[at] - one[at] for one, other in pairs])
            ]
            print(f"| {kind} | {clients} | {' | '.join(cells)} |", flush=True)
    print()


def flush_ms(folder: Path) -> list[float]:
    """p50 and p99 in ms of a durable write of 4 KB. Every call waits for such a write before it ends."""
    times: list[float] = []
    with (folder / "flushed").open("wb", buffering=0) as file:
        for _ in range(300):
            file.write(bytes(4096))
            begin = time.perf_counter()
            os.fsync(file.fileno())
            times.append((time.perf_counter() - begin) * 1000)
    return [sorted(times)[int(len(times) * share)] for share in (0.5, 0.99)]


def throughput(proxies: dict[str, str], process: subprocess.Popen[bytes], rounds: int) -> None:
    print("| answer | proxy | calls/s | of LiteLLM's | CPU ms per call |")
    print("|---|---|---:|---:|---:|")
    for kind in KINDS:
        rates: dict[str, list[float]] = {name: [] for name in proxies}
        cpu: list[float] = []
        for _ in range(rounds):
            for name, url in proxies.items():
                calls, before = (2000 if name == "agl" else 500), cpu_s(process.pid)
                rates[name].append(load(url, 32, calls, 0, kind)["calls_per_s"])
                if name == "agl":
                    cpu.append((cpu_s(process.pid) - before) / (calls + 32) * 1000)
        base = median(rates["LiteLLM"])
        for name in proxies:
            rate, spent = median(rates[name]), f"{median(cpu):.2f}" if name == "agl" else ""
            print(f"| {kind} | {name} | {rate:,.0f} | {rate / base:.1f} | {spent} |", flush=True)
    print()


def hold_streams(url: str, process: subprocess.Popen[bytes], store_uri: str, rollouts: int, waves: int) -> None:
    """Let all rollouts stream at once for seconds, wave after wave; then compare the recorded ids of every call."""
    print(f"{rollouts:,} rollouts at once, each holding a stream open, in {waves} waves:\n")
    print("| wave | seconds | memory MB |\n|---:|---:|---:|")
    for wave in range(waves):
        took = load(url, rollouts, wave, 500, "rollout")
        print(f"| {wave + 1} | {took['seconds']:.1f} | {memory_mb(process.pid).whole:.0f} |", flush=True)
    right = count_right(store_uri, rollouts, waves)
    print(f"\nCalls recorded with the right ids: {right:,} of {rollouts * waves:,}.\n")


def count_right(store_uri: str, rollouts: int, waves: int) -> int:
    """Number of calls with the ids that the engine sent, over rollouts with exactly one call per wave."""
    store = open_store(store_uri)
    right = 0
    for rollout in range(rollouts):
        spans = [s for s in store.query_spans(f"r{rollout}") if s.name == semconv.SPAN_GATEWAY_CALL]
        found = sorted([_ids(span.attributes[name]) for name in _ID_NAMES] for span in spans)
        numbers = [number(rollout, wave) for wave in range(waves)]
        expected = [[prompt_ids(first), token_ids(first)] for first in numbers]
        right += sum(one == other for one, other in zip(found, expected, strict=False)) if len(found) == waves else 0
    store.close()
    return right


_ID_NAMES = (semconv.PROMPT_TOKEN_IDS, semconv.RESPONSE_TOKEN_IDS)


def _ids(value: object) -> list[int]:
    assert isinstance(value, bytes)
    return unpack_ids(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rollouts", type=int, default=1000)
    parser.add_argument("--waves", type=int, default=10)
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part; may be repeated")
    parser.add_argument("--folder", help="folder of the store; /dev/shm avoids waiting for a disk")
    parser.add_argument("--awake", action="store_true", help="keep all cores awake between calls")
    arguments = parser.parse_args()
    names = ("uvicorn", "starlette", "aiohttp", "uvloop")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    print(
        f"Python {platform.python_version()}, {versions}, LiteLLM {LITELLM}. "
        f"Load at the start {os.getloadavg()[0]:.1f}.\n"
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, ExitStack() as stack:
        if arguments.awake:
            stack.enter_context(cores_awake())
        engine = stack.enter_context(null_engine())
        url, process, store = stack.enter_context(ours(Path(folder), engine))
        parts = arguments.only or PARTS
        if "latency" in parts:
            typical, slow = flush_ms(Path(folder))
            print(f"A flush of 4 KB to this disk alone: p50 {typical:.2f} ms, p99 {slow:.2f} ms.\n")
            added_latency(engine, url, arguments.rounds)
        if "throughput" in parts:
            with litellm(Path(folder), engine) as other:
                throughput({"agl": url, "LiteLLM": other}, process, arguments.rounds)
        if "streams" in parts:
            hold_streams(url, process, store, arguments.rollouts, arguments.waves)
    print(f"Load at the end {os.getloadavg()[0]:.1f}.")


if __name__ == "__main__":
    main()
