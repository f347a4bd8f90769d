"""The compared collectors, ours and those of peers, each a separate server on free ports of loopback."""

import atexit
import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import psutil

from agl.store import open_store
from benchmarks.corpus import ANYONE
from tests.ports import free_port
from tests.queue.redis_server import RedisServer
from tests.store.cassandra_server import CassandraServer
from tests.store.postgres_server import running_postgres
from tests.store.serving import serving
from tests.venv import python_with
from tests.waiting import wait_until


@dataclass(frozen=True, slots=True)
class Running:
    """A started receiver: its URL for spans, a function that counts its spans, and the pid of its main process."""

    url: str
    count: Callable[[], int]
    pid: int
    resources: Sequence[Mapping[str, str]] = ANYONE
    """Resource attributes that it requires of spans; traces take them in turn."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Additional headers that it requires of requests."""


@dataclass(frozen=True, slots=True)
class Receiver:
    """A receiver that can be measured. `start` runs it with its files below a folder, which is empty at first."""

    name: str
    start: Callable[[Path], AbstractContextManager[Running]]


@contextmanager
def _agl(store_uri: str, *options: str) -> Iterator[Running]:
    with serving(store_uri, *options) as (process, url), closing(open_store(store_uri)) as store:
        yield Running(url, store.count_spans, process.pid)


@contextmanager
def _sqlite(folder: Path) -> Iterator[Running]:
    with _agl(f"sqlite:///{folder}/agl.db") as running:
        yield running


@contextmanager
def _postgresql(_: Path) -> Iterator[Running]:
    with running_postgres(durable=True) as server, _agl(server.new_database()) as running:
        yield running


@contextmanager
def _cassandra(_: Path) -> Iterator[Running]:
    uri = _cluster().empty_keyspace()
    open_store(uri).close()
    with _agl(uri) as running:
        yield running


@cache
def _cluster() -> CassandraServer:
    """Three nodes on the same cores, each with a copy of every span. They start slowly and so run until exit."""
    cluster = CassandraServer(3)
    atexit.register(cluster.stop)
    return cluster


@contextmanager
def _redis(folder: Path) -> Iterator[Running]:
    """Redis as a queue in front of SQLite. Redis acknowledges only what is on disk."""
    redis = RedisServer(folder / "redis")
    redis.start()
    try:
        with _agl(f"sqlite:///{folder}/agl.db", "--queue", redis.uri) as running:
            yield running
    finally:
        redis.kill()


@contextmanager
def _agentlightning(folder: Path) -> Iterator[Running]:
    """With its in-memory store. It keeps only spans of rollouts that it has created."""
    python, port = python_with("agentlightning", "agentlightning==0.3.0", over_ours=False), free_port()
    command = [str(python), "-m", "agentlightning.cli.store", "--host", "127.0.0.1", "--port", str(port)]
    api = httpx.Client(base_url=f"http://127.0.0.1:{port}/v1/agl", timeout=60)
    with _process([*command, "--log-level", "ERROR"], folder) as process, api:
        wait_until(lambda: _answers(api, "/health"), timeout_s=120)
        resources = [_begin_rollout(api) for _ in range(64)]
        url = f"http://127.0.0.1:{port}/v1/traces"
        yield Running(url, lambda: api.get("/statistics").json()["total_spans"], process.pid, resources)


@contextmanager
def _mlflow(folder: Path) -> Iterator[Running]:
    """With one worker and a SQLite store."""
    python, port = python_with("mlflow", "mlflow==3.17.2", over_ours=False), free_port()
    where = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--default-artifact-root", f"{folder}/artifacts"]
    api = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
    with _process([str(python), "-m", "mlflow", "server", *where, *store], folder) as process, api:
        wait_until(lambda: _answers(api, "/health"), timeout_s=300)
        headers = {"x-mlflow-experiment-id": "0"}
        yield Running(f"{api.base_url}/v1/traces", lambda: _rows(folder / "mlflow.db"), process.pid, headers=headers)


@contextmanager
def _phoenix(folder: Path) -> Iterator[Running]:
    """With a SQLite store. It acknowledges spans before it stores them."""
    python, port = python_with("phoenix", "arize-phoenix==20.26.1", over_ours=False), free_port()
    settings = {
        "PHOENIX_WORKING_DIR": str(folder),
        "PHOENIX_HOST": "127.0.0.1",
        "PHOENIX_PORT": str(port),
        "PHOENIX_GRPC_PORT": str(free_port()),
        "PHOENIX_TELEMETRY_ENABLED": "false",
        "PHOENIX_ALLOW_EXTERNAL_RESOURCES": "false",
    }
    api = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
    with _process([str(python), "-m", "phoenix.server.main", "serve"], folder, settings) as process, api:
        wait_until(lambda: _answers(api, "/healthz"), timeout_s=300)
        yield Running(f"{api.base_url}/v1/traces", lambda: _rows(folder / "phoenix.db"), process.pid)


def _rows(path: Path) -> int:
    """Number of spans in a peer's database."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=60)) as db:
        return db.execute("SELECT count(*) FROM spans").fetchone()[0]


def _begin_rollout(api: httpx.Client) -> dict[str, str]:
    """Create a rollout; return the resource attributes of its spans."""
    rollout = api.post("/rollouts", json={"input": None}).raise_for_status().json()
    ids = {"rollout_id": rollout["rollout_id"], "attempt_id": rollout["attempt"]["attempt_id"]}
    return {f"agentlightning.{name}": value for name, value in ids.items()}


@contextmanager
def _process(
    command: Sequence[str], folder: Path, settings: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[Any]]:
    """Run `command` with its output in `folder`/log and with `settings` added to the environment."""
    environment = os.environ | {"NO_PROXY": "*"} | dict(settings or {})
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment)
    try:
        yield process
    finally:
        for one in (*psutil.Process(process.pid).children(recursive=True), process):
            one.kill()
        process.wait()


def _answers(client: httpx.Client, path: str) -> bool:
    try:
        return client.get(path).is_success
    except httpx.TransportError:
        return False


OURS = (
    Receiver("agl, SQLite", _sqlite),
    Receiver("agl, PostgreSQL", _postgresql),
    Receiver("agl, Redis, SQLite", _redis),
    Receiver("agl, three nodes of Cassandra", _cassandra),
)
PEERS = (
    Receiver("agentlightning 0.3, in memory", _agentlightning),
    Receiver("MLflow 3.17", _mlflow),
    Receiver("Phoenix 20.26", _phoenix),
)
