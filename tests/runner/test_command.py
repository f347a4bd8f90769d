"""Unmodified programs as agents: what they are told, how they answer, fail, hang and leave processes behind."""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.util.re import parse_env_headers

from agl import semconv
from agl.errors import AgentError, ConfigError
from agl.runner.agent_loop import AgentLoop
from agl.runner.command import Addresses, Command
from agl.runner.runner import Outcome, Runner
from agl.server_thread import ServerThread
from agl.store import Rollout, Store
from agl.trajectory import build_trajectory
from tests.core.fake_engine import FakeEngine
from tests.waiting import is_alive, wait_until

PROGRAM = """
import json, os, subprocess, sys, time, urllib.request

task = json.load(sys.stdin)
print("working on", task["do"][:20], flush=True)
if task["do"] == "call":
    assert json.loads(os.environ["AGL_TASK"]) == task and os.environ["TRACEPARENT"]
    body = json.dumps({"model": "base", "messages": [{"role": "user", "content": "hi"}]}).encode()
    headers = {"content-type": "application/json", "authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers)
    print(json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"])
elif task["do"] == "fail":
    sys.exit("no such table")
elif task["do"] == "eat":
    bytes(2 ** 33)
elif task["do"] == "hang":
    open(task["file"], "w").write(str(os.getpid()))
    time.sleep(600)
elif task["do"] == "leave":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid)
elif task["do"].startswith("large"):
    print("AGL_TASK" in os.environ, len(task["do"]))
elif task["do"] == "nothing":
    pass
"""


@pytest.fixture
def runner(store: Store, tmp_path: Path) -> Iterator[Runner]:
    """Runs PROGRAM, whose model calls a gateway before a fake engine answers."""
    (tmp_path / "program.py").write_text(PROGRAM)
    with ServerThread(store, port=0, otlp_http_port=0, upstream=FakeEngine().app) as server:
        command = f"{sys.executable} {tmp_path / 'program.py'}"
        agent = Command.parse(command, Addresses(server.base_url, server.otlp_url), 2**32)
        with Runner(store, agent, reward=lambda task, answer: float(len(answer or "")), timeout_s=20) as runner:
            yield runner


def run(runner: Runner, **tasks: Any) -> dict[str, Outcome]:
    """Run a rollout for each task, in mode eval."""
    made = [Rollout(name, {"do": name} | task, group_id="g", mode="eval") for name, task in tasks.items()]
    return dict(zip(tasks, runner.run(made), strict=True))


def test_a_program_is_an_agent_as_it_is(runner: Runner, store: Store) -> None:
    large = "large" + "x" * 200_000
    found = run(runner, call={}, fail={}, eat={}, large={"do": large}, nothing={"do": "nothing"})
    assert (found["call"].answer, found["call"].reward) == ("Hello there!", 12.0)
    trajectory = build_trajectory(store.query_spans("call"))
    (call,) = trajectory.calls  # The request had no header of ours: the URL names its rollout.
    assert (call.attempt_id, trajectory.group_id, trajectory.mode, trajectory.reward) == ("call-a1", "g", "eval", 12.0)
    assert found["fail"].error == f"agl.errors.AgentError: {sys.executable} exited with 1: no such table"
    assert found["eat"].error is not None and "MemoryError" in found["eat"].error
    assert found["large"].answer == f"False {len(large)}"
    assert found["nothing"].answer == "working on nothing"
    (root,) = (span for span in store.query_spans("fail") if span.name == semconv.SPAN_ROLLOUT)
    logs = [event.attributes for event in root.events if event.name == semconv.EVENT_LOG]
    assert [(log[semconv.LOG_SOURCE], log[semconv.LOG_BODY]) for log in logs] == [
        ("stdout", "working on fail"),
        ("stderr", "no such table"),
    ]


def test_a_program_and_what_it_started_end_with_their_attempt(runner: Runner, store: Store, tmp_path: Path) -> None:
    file, loop = tmp_path / "pid", AgentLoop()
    agent = Command.parse(f"{sys.executable} {tmp_path / 'program.py'}", Addresses("", ""))
    hanging = loop.submit(agent({"do": "hang", "file": str(file)}))
    wait_until(lambda: file.exists() and file.read_text() != "")
    hanging.cancel()  # As a runner does at the timeout.
    processes = [int(run(runner, leave={})["leave"].answer), int(file.read_text())]
    wait_until(lambda: not any(map(is_alive, processes)))
    loop.close()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("pyhton my_agent.py", "there is no program 'pyhton' on PATH"),
        ("./no_such_file --fast", "there is no program './no_such_file'"),
        (f"{sys.executable} no_such_agent.py", "there is no file 'no_such_agent.py'"),
        ("python 'my_agent.py", "No closing quotation"),
        (" ", "train.command is empty"),
    ],
)
def test_a_command_that_cannot_run_is_named(command: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Command.parse(command, Addresses("", ""))


def test_a_line_of_a_shell_and_a_file_that_is_written_are_no_missing_script(tmp_path: Path) -> None:
    (tmp_path / "agent.py").touch()
    for command in ("sh -c 'cd agents && python agent.py'", f"{sys.executable} {tmp_path}/agent.py --out new.py"):
        assert Command.parse(command, Addresses("", "")).arguments


def test_a_process_that_keeps_the_output_open_in_another_session_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agl.runner.command._PIPES_S", 0.1)
    agent = Command.parse("sh -c 'setsid sleep 5 & echo done'", Addresses("", ""))
    with pytest.raises(AgentError, match=r"sh ended, but its output did not .*\(setsid\) holds it"):
        asyncio.run(agent({}))


def test_a_token_reaches_the_exporter_as_it_is() -> None:
    header = Addresses("", "", "a%20b,c=+/").variables()["OTEL_EXPORTER_OTLP_HEADERS"]
    assert parse_env_headers(header) == {"authorization": "Bearer a%20b,c=+/"}
