"""The commands of Compose and of the chart, run as they are on loopback, with PostgreSQL and Redis."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest

from agl import otlp
from agl.server.app_thread import AppThread
from tests.core.fake_engine import FakeEngine
from tests.core.span_maker import gateway_call
from tests.deploy.manifests import (
    EVERYTHING,
    RELEASE,
    SECRETS,
    Part,
    chart_parts,
    compose,
    compose_parts,
    named,
    rendered,
)
from tests.ports import free_port
from tests.queue.redis_server import RedisServer
from tests.store.postgres_server import PostgresServer, running_postgres
from tests.waiting import wait_until

PROTOBUF = {"content-type": "application/x-protobuf"}
GRACE_S = 30


@dataclass(frozen=True, slots=True)
class Running:
    """A started part: its process, and its ports of this machine by those in the manifests."""

    process: subprocess.Popen[str]
    ports: dict[int, int]
    token: str

    def url(self, port: int, path: str) -> str:
        return f"http://127.0.0.1:{self.ports[port]}{path}"

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token}"}

    def spans(self) -> int | None:
        return httpx.get(self.url(8400, "/api/health")).json()["spans"]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(GRACE_S) == 0


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with running_postgres() as server:
        with psycopg.connect(server.uri("postgres"), autocommit=True) as connection:
            connection.execute("CREATE ROLE agl SUPERUSER LOGIN")
        yield server


@contextmanager
def running_redis(folder: Path, *options: str) -> Iterator[RedisServer]:
    server = RedisServer(folder, options)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def here(uri: str, host: str, port: int, path: str) -> str:
    """`uri`, which must be of `host`, on a port of this machine."""
    parts = urlsplit(uri)
    assert parts.hostname == host
    login = parts.netloc.rpartition("@")[0]
    return parts._replace(netloc=f"{login}@127.0.0.1:{port}" if login else f"127.0.0.1:{port}", path=path).geturl()


def start(part: Part, environment: Mapping[str, str], folder: Path) -> Running:
    """Run the command of `part` on free ports, and with its configuration in a file of `folder`."""
    file = folder / f"{part.name}.yaml"
    file.write_text(part.config)
    ports = {8400: free_port(), 4318: free_port(), 4317: free_port()}
    options = ("--port", ports[8400], "--otlp-http-port", ports[4318], "--otlp-grpc-port", ports[4317])
    words = [str(file) if word.startswith("/etc/agl/") else word for word in part.words]
    process = subprocess.Popen(
        [sys.executable, "-m", "agl", *words, *map(str, options)],
        env={**os.environ, **part.environment, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    return Running(process, ports, part.environment["AGL_TOKEN"])


def wait_for(running: Running) -> None:
    """Until it serves."""
    assert running.process.stdout is not None
    assert any(line.startswith("waiting for spans") for line in running.process.stdout), "it ended"


def database(postgres: PostgresServer) -> tuple[int, str]:
    """Port, and path in a URI, of a new database."""
    parts = urlsplit(postgres.new_database())
    assert parts.port is not None
    return parts.port, parts.path


def test_two_of_each_service_of_compose_share_store_and_queue(postgres: PostgresServer, tmp_path: Path) -> None:
    services = compose(SECRETS)
    port, path = database(postgres)
    engine = AppThread()
    upstream = f"{engine.add(FakeEngine(models=('writer',)).app)}/v1"
    command = services["redis"]["command"]
    assert command[0] == "redis-server"
    with ExitStack() as stack:
        stack.enter_context(engine)
        redis = stack.enter_context(running_redis(tmp_path / "redis", *command[1:]))
        running: dict[str, list[Running]] = {"collector": [], "gateway": []}
        for part in compose_parts(services):
            if part.name not in running:
                continue
            environment = {"AGL_STORE_URI": here(part.environment["AGL_STORE_URI"], "postgres", port, path)}
            if part.name == "collector":
                environment["AGL_QUEUE_URI"] = here(part.environment["AGL_QUEUE_URI"], "redis", redis.port, "")
            else:
                environment["AGL_UPSTREAM"] = upstream
            for _ in range(2):
                running[part.name].append(each := start(part, environment, tmp_path))
                stack.callback(each.process.kill)
        for each in (*running["collector"], *running["gateway"]):
            wait_for(each)
        collectors, gateways = running["collector"], running["gateway"]

        for collector in collectors:
            traces = collector.url(4318, "/v1/traces")
            body = otlp.encode([gateway_call()])
            assert httpx.post(traces, content=body, headers=PROTOBUF).status_code == 401
            assert httpx.post(traces, content=body, headers=PROTOBUF | collector.headers).status_code == 200
        call = {"model": "writer", "messages": [{"role": "user", "content": "hi"}]}
        for gateway in gateways:
            answer = httpx.post(gateway.url(8400, "/v1/chat/completions"), json=call, headers=gateway.headers)
            assert answer.status_code == 200, answer.text
        wait_until(lambda: all(gateway.spans() == 4 for gateway in gateways))
        check_health(services["gateway"], gateways[0])
        for name in ("gateway", "collector"):
            status = [
                httpx.get(running[name][0].url(8400, "/api/health"), headers={"host": host}).status_code
                for host in (name, f"{name}:8400", "elsewhere")
            ]
            assert status == [200, 200, 421]
        for each in (*gateways, *collectors):
            each.stop()


def check_health(service: dict[str, object], running: Running) -> None:
    """Run the health check of a service of Compose, which must succeed only while the server answers."""
    healthcheck = service["healthcheck"]
    assert isinstance(healthcheck, dict)
    kind, program, *words = healthcheck["test"]
    assert (kind, program) == ("CMD", "python")
    words = [word.replace("8400", str(running.ports[8400])) for word in words]
    assert subprocess.run([sys.executable, *words]).returncode == 0
    words = [word.replace("/api/health", "/api/nothing") for word in words]
    assert subprocess.run([sys.executable, *words], capture_output=True).returncode == 1


def test_a_collector_of_the_chart_has_the_probes_and_the_metrics_that_it_is_asked_for(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    manifests = rendered(EVERYTHING)
    (part,) = (part for part in chart_parts(manifests) if part.name == "collector")
    (container,) = named(manifests, "Deployment", "collector")["spec"]["template"]["spec"]["containers"]
    secret = named(manifests, "Secret", "secrets")["stringData"]
    port, path = database(postgres)
    settings = tmp_path / "redis.conf"
    settings.write_text(secret["redis.conf"].replace("/data", str(tmp_path)))
    with ExitStack() as stack:
        redis = stack.enter_context(protected_redis(settings, secret["REDISCLI_AUTH"]))
        environment = {
            "AGL_STORE_URI": here(part.environment["AGL_STORE_URI"], f"{RELEASE}-postgresql", port, path),
            "AGL_QUEUE_URI": here(part.environment["AGL_QUEUE_URI"], f"{RELEASE}-redis", redis, ""),
        }
        running = start(part, environment, tmp_path)
        stack.callback(running.process.kill)
        wait_for(running)
        names = {named_port["name"]: named_port["containerPort"] for named_port in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container[probe]["httpGet"]
            assert httpx.get(running.url(names[asked["port"]], asked["path"])).status_code == 200
        body = otlp.encode([gateway_call()])
        answer = httpx.post(running.url(4318, "/v1/traces"), content=body, headers=PROTOBUF | running.headers)
        assert answer.status_code == 200
        wait_until(lambda: running.spans() == 1)
        monitor = named(manifests, "ServiceMonitor", "collector")["spec"]["endpoints"][0]
        metrics = running.url(names[monitor["port"]], monitor["path"])
        assert httpx.get(metrics).status_code == 401
        assert monitor["authorization"]["credentials"]["key"] == "AGL_TOKEN"
        assert "\nspan_queue_length 0.0\n" in httpx.get(metrics, headers=running.headers).text
        running.stop()


@contextmanager
def protected_redis(settings: Path, password: str) -> Iterator[int]:
    """The port of a Redis with the chart's settings, which answers only who knows the password."""
    port = free_port()
    process = subprocess.Popen(["redis-server", str(settings), "--port", str(port)], stdout=subprocess.DEVNULL)

    def ask(**variables: str) -> str:
        command = ["redis-cli", "-p", str(port), "ping"]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}).stdout

    try:
        wait_until(lambda: ask(REDISCLI_AUTH=password) == "PONG\n")
        assert "NOAUTH" in ask()
        yield port
    finally:
        process.kill()
        process.wait()
