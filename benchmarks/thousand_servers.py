"""The servers under the load of `benchmarks.thousand`: one `agl serve`, or two gateways and two collectors."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from agl.runner.child import child_command
from benchmarks.gateway import answers
from tests.ports import free_port
from tests.queue.redis_server import RedisServer
from tests.store.postgres_server import running_postgres
from tests.waiting import wait_until

AGL = Path(sys.executable).with_name("agl")
_START_S = 120


@dataclass(slots=True)
class Process:
    """A server that can be killed and started again."""

    command: list[str]
    health: str
    running: "subprocess.Popen[bytes]"

    @classmethod
    def started(cls, command: list[str], health: str) -> "Process":
        process = cls(command, health, _popen(command))
        wait_until(lambda: answers(health), _START_S)
        return process

    def restart(self) -> None:
        """SIGKILL, and a new process, which need not answer yet."""
        self.running.kill()
        self.running.wait()
        self.running = _popen(self.command)


def _popen(command: list[str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(child_command(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@dataclass(frozen=True, slots=True)
class Servers:
    """The servers under load, by name, and their addresses."""

    processes: Mapping[str, Process]
    gateway: str
    collector: str
    store_uri: str

    def queued(self) -> int:
        """Spans that are acknowledged and not in the store yet."""
        lengths: list[int] = []
        for process in self.processes.values():
            wait_until(lambda process=process: answers(process.health), _START_S)
            with urllib.request.urlopen(process.health, timeout=30) as answer:
                lengths.append(json.load(answer).get("span_queue_length") or 0)
        return max(lengths)


@contextmanager
def one_server(folder: Path, engine: str) -> Iterator[Servers]:
    config, store = folder / "agl.json", f"sqlite:///{folder}/agl.db"
    config.write_text(json.dumps({"gateway": {"engines": [{"url": engine, "max_concurrent": 4096}]}}))
    port, otlp = free_port(), free_port()
    ports = ["--port", str(port), "--otlp-http-port", str(otlp), "--otlp-grpc-port", "0"]
    url = f"http://127.0.0.1:{port}"
    command = [str(AGL), "serve", "--config", str(config), "--store", store, *ports]
    process = Process.started(command, f"{url}/api/health")
    try:
        yield Servers({"agl serve": process}, url, f"http://127.0.0.1:{otlp}", store)
    finally:
        process.running.kill()
        process.running.wait()


@contextmanager
def several_servers(folder: Path, engine: str) -> Iterator[Servers]:
    """Two gateways and two collectors, each pair behind one address."""
    config = folder / "agl.json"
    config.write_text(json.dumps({"gateway": {"engines": [{"url": engine, "max_concurrent": 4096}]}}))
    redis = RedisServer(folder / "redis")
    redis.start()
    with running_postgres(durable=True) as postgres, ExitStack() as stack:
        stack.callback(redis.kill)
        store = postgres.new_database()
        started: dict[str, Process] = {}
        ports: dict[str, list[int]] = {"gateway": [], "collector": []}
        for kind in ports:
            for number in (1, 2):
                port, otlp = free_port(), free_port()
                command = [str(AGL), "serve", "--config", str(config), "--store", store, "--port", str(port)]
                command += ["--otlp-http-port", str(otlp), "--otlp-grpc-port", "0"]
                command += ["--queue", redis.uri] if kind == "collector" else []
                process = Process.started(command, f"http://127.0.0.1:{port}/api/health")
                stack.callback(lambda process=process: process.running.kill())
                started[f"{kind} {number}"] = process
                ports[kind].append(port if kind == "gateway" else otlp)
        urls: dict[str, str] = {}
        for kind, behind in ports.items():
            port = free_port()
            address = _popen([sys.executable, "-m", "benchmarks.address", str(port), *map(str, behind)])
            stack.callback(address.kill)
            urls[kind] = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(f"{urls['gateway']}/api/health"))
        yield Servers(started, urls["gateway"], urls["collector"], store)
