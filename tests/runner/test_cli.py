"""`agl runner` as a process: it needs no torch, drains, is killed, and says what is wrong with its configuration."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from agl.cli import _parser, main
from agl.cli.runner import _addresses
from agl.config import TrainConfig
from agl.secret_url import SecretUrl
from agl.server_thread import ServerThread
from agl.store import Rollout, Store, open_store
from agl.trajectory import build_trajectory
from tests.core.fake_engine import FakeEngine
from tests.waiting import wait_until

AGENT = """
import os, time
import openai, agl

def run(task):
    agl.emit_message("began")
    while task == "hang" and not os.path.exists("go"):
        time.sleep(0.01)
    with openai.OpenAI(default_headers=agl.headers()) as client:
        reply = client.chat.completions.create(model="base", messages=[{"role": "user", "content": "hi"}])
    return reply.choices[0].message.content

def score(task, answer):
    return {"length": len(answer)}
"""
GATEWAY = ["--gateway", "http://localhost:1/v1"]
WITHOUT_TORCH = """
import sys
sys.modules |= dict.fromkeys(("torch", "transformers", "agl_trainer", "starlette", "aiohttp"))
from agl.cli import main
sys.exit(main())
"""
"""A name that `sys.modules` has as None cannot be imported."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Store, ServerThread]]:
    (tmp_path / "my_agent.py").write_text(AGENT)
    train = {"model": "tiny", "agent": "my_agent:run", "reward": "my_agent:score", "output_dir": "runs/shop"}
    write(tmp_path, train)
    with (
        closing(open_store(f"sqlite:///{tmp_path / 'agl.db'}")) as store,
        ServerThread(store, port=0, otlp_http_port=0, upstream=FakeEngine().app) as server,
    ):
        yield store, server


def write(folder: Path, train: dict[str, Any]) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump({"rewards": {"length": 0.5}, "train": train}))


@contextmanager
def agl_runner(folder: Path, server: ServerThread, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", WITHOUT_TORCH, "runner", "config.yaml", "--store", server.base_url]
    command += ["--collector", server.otlp_url, *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "OTEL_"))}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def queue(store: Store, **tasks: str) -> None:
    run = {"run": "shop"}
    limits: dict[str, Any] = {"max_attempts": 2, "unresponsive_s": 60.0}
    store.enqueue_rollouts([Rollout(name, task, group_id="g", metadata=run, **limits) for name, task in tasks.items()])


def test_a_runner_that_is_killed_costs_its_leases_and_one_that_stops_nothing(
    served: tuple[Store, ServerThread], tmp_path: Path
) -> None:
    store, server = served
    queue(store, first="quick", second="hang")
    with agl_runner(tmp_path, server) as killed:
        wait_until(lambda: has_ended(store, "first") and bool(store.query_attempts("second")))
        killed.kill()
    trajectory = build_trajectory(store.query_spans("first"))
    assert (trajectory.reward, len(trajectory.calls)) == (0.5 * len("Hello there!"), 1)
    (second,) = store.query_attempts("second")
    (ended,) = store.end_overdue_attempts(second.started_ns + 10**12)  # Long after its last sign of life.
    assert ended.state == "unresponsive"
    (tmp_path / "go").touch()
    with agl_runner(tmp_path, server) as other:
        wait_until(lambda: has_ended(store, "second"))
        other.send_signal(signal.SIGTERM)
        output, _ = other.communicate(timeout=60)
    assert other.returncode == 0
    assert [attempt.state.value for attempt in store.query_attempts("second")] == ["unresponsive", "succeeded"]
    first, last = output.splitlines()
    assert re.match(rf"runner \S+: rollouts of run shop in {server.base_url}, calls to {server.base_url}", first)
    assert re.match(r"runner \S+: 1 rollout \(1 succeeded\)", last)


def has_ended(store: Store, name: str) -> bool:
    rollout = store.get_rollout(name)
    return rollout is not None and rollout.state.is_over


def test_a_process_of_several_is_replaced(served: tuple[Store, ServerThread], tmp_path: Path) -> None:
    store, server = served
    queue(store, first="hang", second="hang")
    with agl_runner(tmp_path, server, "--processes", "2", "--concurrency", "1") as several:
        wait_until(lambda: all(store.query_attempts(name) for name in ("first", "second")))
        workers = {store.query_attempts(name)[0].worker_id for name in ("first", "second")}
        assert len(workers) == 2
        os.kill(int(workers.pop().rpartition("-")[2]), signal.SIGKILL)
        queue(store, third="quick")
        wait_until(lambda: has_ended(store, "third"))  # By the new process: the other one still hangs.
        (tmp_path / "go").touch()
        several.terminate()
        output, _ = several.communicate(timeout=60)
    assert several.returncode == 0
    assert re.search(r"runner \d+ ended by SIGKILL; another takes its place", output)


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        ({"agent": "no_such_agent:run"}, GATEWAY, "there is no module 'no_such_agent'"),
        ({"agent": None}, GATEWAY, "train.agent is not set"),
        ({"agent": None, "command": "pyhton agent.py"}, GATEWAY, "there is no program 'pyhton'"),
        ({"command": "python agent.py"}, [], "agent and command both name the agent"),
        ({}, [], "nothing names the gateway for the agent's model calls"),
        ({"runners": "external"}, [], "external needs port and otlp_http_port"),
        ({"runners": 2, "deterministic": True}, [], "runners and deterministic exclude each other"),
    ],
)
def test_what_cannot_run_ends_with_a_sentence_and_exit_code_2(
    train: dict[str, Any],
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "my_agent.py").write_text(AGENT)
    write(tmp_path, {"model": "tiny", "agent": "my_agent:run"} | train)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if "OPENAI_" not in name})
    assert main(["runner", "config.yaml", *options]) == 2
    output = capsys.readouterr()
    assert message in output.err and "Traceback" not in output.err


@pytest.mark.parametrize(
    ("store", "gateway", "train", "expected"),
    [
        ("http://T@trainer:8400", None, {}, ("http://trainer:8400", "http://elsewhere:1", "T")),
        ("http://trainer:8400", None, {"otlp_http_port": 5}, ("http://trainer:8400", "http://trainer:5", "")),
        ("sqlite:///a.db", None, {"port": 7}, ("http://127.0.0.1:7", "http://elsewhere:1", "")),
        ("sqlite:///a.db", None, {}, ("https://api.example.com", "http://elsewhere:1", "")),
        ("sqlite:///a.db", "http://g:9/v1/", {}, ("http://g:9", "http://elsewhere:1", "")),
    ],
)
def test_the_store_says_where_gateway_and_collector_are_before_the_environment(
    store: str, gateway: str | None, train: dict[str, Any], expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's OPENAI_BASE_URL may name a provider that the agent's other tools use."""
    environment = {"OPENAI_BASE_URL": "https://api.example.com/v1", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://elsewhere:1"}
    monkeypatch.setattr(os, "environ", environment)
    options = ["config.yaml", *(["--gateway", gateway] if gateway else [])]
    parsed = _parser(["runner", *options]).parse_args(["runner", *options])
    found = _addresses(parsed, TrainConfig(model="tiny", **train), SecretUrl(store))
    assert (found.gateway, found.collector, found.token) == expected
