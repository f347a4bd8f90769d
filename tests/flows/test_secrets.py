"""A marked secret in every key and variable that takes one: commands, a training and a server show none of them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from agl.cli import main
from agl.config.collector import TOKEN_VARIABLE
from agl.server.auth import BearerTokens
from agl.server_thread import ServerThread
from agl.store import open_store
from tests.core.fake_engine import FakeEngine
from tests.core.scripted_judge import ScriptedJudge
from tests.gateway.serving import chat_body, serving

MARK = "pl4nted"
"""A part of every secret."""
TOY = "tests.flows.toy_agent"
TRACKER = """
import json, pathlib, types
def init(**given):
    pathlib.Path(given["dir"], "tracked.json").write_text(json.dumps(given))
    return types.SimpleNamespace(id="x", log=lambda *_, **__: None, finish=lambda: None)
"""
"""A `wandb` that keeps what it is given."""
HIDDEN = {
    "queue_uri": f"redis://:{MARK}@127.0.0.1:9/0?password={MARK}",
    "queue": {"on_queue_high": f"https://127.0.0.1:9/hooks/{MARK}"},
    "collector": {"token_file": "tokens"},
}
COMMANDS = """
config show {config}
config show {config} --json
doctor --config {config}
doctor --config {engines} --json
store count --store {store}
store check --store {store}
store repair --store {store}
store gc --older-than 7d --store {store}
store migrate --store {store}
store backup copy.db --store {store}
store count --store {postgres}
store count --store {cassandra}
store count --store {wrong}
store count --store {ambiguous}
inspect --last --store {store}
rollouts --store {store}
trajectories --last --store {store} --json
spans export --last --store {store}
spans import missing.jsonl --store {postgres}
adapters list {config}
adapters export {config} solver --to exported
serve --store {postgres} --port 0
serve --store {store} --upstream {ambiguous}
serve --store {store} --upstream {wrong} --port 0
serve --store {store} --queue {queue} --port 0
serve --config {broken}
train {engines}
sft {config}
eval {config}
"""
"""The commands, and ways in which they fail. Each line is one of them; `serve` has a test of its own."""


def url_with(login: str, url: str) -> str:
    return url.replace("://", f"://{login}@")


def write(path: Path, data: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(data))
    return path


def config_of(folder: Path, store: str, judge: str) -> dict[str, Any]:
    train = {
        "model": "tiny",
        "agent": f"{TOY}:answer",
        "tasks": f"{TOY}:few_tasks",
        "eval_tasks": f"{TOY}:few_tasks",
        "group_size": 2,
        "groups_per_step": 1,
        "steps": 1,
        "max_tokens": 4,
        "output_dir": str(folder / "run"),
        "report_to": ["wandb"],
    }
    return HIDDEN | {
        "store_uri": store,
        "agent_roles": {"solver": {"lora_r": 2}},
        "engine": {"max_batch": 4, "max_model_len": 96},
        "train": train,
        "sft": {"examples": f"{TOY}:few_examples", "epochs": 1},
        "judge": {"url": judge, "model": "m", "criteria": "Letters.", "rankings": 1},
    }


def found_in(folder: Path, but: Sequence[str]) -> list[str]:
    """The files below `folder` that hold the mark, `but` those that the test wrote."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in but]
    assert len(files) > 3
    return [str(path) for path in files if MARK.encode() in path.read_bytes()]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, with secrets in the environment."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokens").write_text(f"{MARK}-agent agent\n")
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(TRACKER)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in (TOKEN_VARIABLE, "ENGINE_KEY", "OPENAI_API_KEY", "WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, f"{MARK}-{name.lower()}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization=Bearer%20{MARK}")
    yield tmp_path
    sys.modules.pop("wandb", None)  # Other tests rely on that it is not installed.


def test_commands_and_a_training_show_no_secret(
    desk: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with (
        closing(open_store(f"sqlite:///{desk / 'agl.db'}")) as store,
        ServerThread(store, port=0, otlp_http_port=0, tokens=BearerTokens([f"{MARK}-store"])) as server,
        ScriptedJudge(lambda attempts, _: json.dumps({"ranking": [*range(1, len(attempts) + 1)]})) as judge,
    ):
        remote = url_with(f"{MARK}-store", server.base_url)
        config = config_of(desk, remote, url_with(f"me:{MARK}-judge", judge.url))
        upstream = {"gateway": {"engines": [{"url": f"http://me:{MARK}@127.0.0.1:9/v1"}]}}
        places = {
            "config": write(desk / "config.yaml", config),
            "engines": write(desk / "engines.yaml", config | upstream),
            "broken": write(desk / "broken.yaml", {"gateway": {"engines": [f"http://me:{MARK}@h/v1"]}}),
            "store": remote,
            "queue": HIDDEN["queue_uri"],
            "postgres": f"postgresql://me:{MARK}@127.0.0.1:1/db?sslpassword={MARK}",
            "cassandra": f"cassandra://me:{MARK}@127.0.0.1:1/agl",
            "wrong": f"ftp://me:{MARK}@127.0.0.1/v1",
            "ambiguous": f"http://me:{MARK}/{MARK}@127.0.0.1:9/v1",
        }
        assert main(["train", str(places["config"])]) == 0
        for line in COMMANDS.strip().splitlines():
            main(line.format(**places).split())
        assert judge.requests and set(judge.keys) == {"Basic bWU6cGw0bnRlZC1qdWRnZQ=="}  # me:pl4nted-judge
        assert MARK not in json.dumps(judge.requests)
    out, err = capfd.readouterr()
    assert '"train"' in out and "127.0.0.1:1/db" in err
    lines = [line for line in (out + err + caplog.text).splitlines() if MARK in line]
    assert lines == []
    assert found_in(desk, ["config.yaml", "engines.yaml", "broken.yaml", "tokens"]) == []


@contextmanager
def serve(folder: Path, *options: str) -> Iterator[list[str]]:
    """`agl serve` in a process of its own, with its output in `folder`/serve.log; the URLs in its first two lines."""
    command = [sys.executable, "-c", "import sys; from agl.cli import main; sys.exit(main())", "serve", *options]
    ports = ["--port", "0", "--otlp-http-port", "0", "--otlp-grpc-port", "0"]
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen([*command, *ports], stdout=subprocess.PIPE, stderr=log, env=os.environ)
    assert process.stdout is not None
    lines = [process.stdout.readline().decode() for _ in range(3)]
    try:
        yield lines
    finally:
        process.terminate()
        rest, _ = process.communicate(timeout=30)
        (folder / "serve.out").write_bytes("".join(lines).encode() + rest)


def test_a_server_shows_no_secret_to_anybody(desk: Path) -> None:
    engine = FakeEngine()
    with ExitStack() as stack:
        url = stack.enter_context(serving(engine))
        gone = {"url": f"http://me:{MARK}-gone@127.0.0.1:9/v1", "models": ["gone"]}
        engines = [{"url": url_with(f"me:{MARK}", url), "models": ["writer"]}, gone]
        gateway = {"gateway": {"engines": engines, "retries": 0}}
        store = {"store_uri": f"sqlite:///{desk / 'agl.db'}"}
        write(desk / "config.yaml", {"collector": HIDDEN["collector"]} | store | gateway)
        lines = stack.enter_context(serve(desk, "--config", "config.yaml"))
        found = re.search(r"gateway +(http://[\w.:]+)", lines[1])
        assert found
        client = stack.enter_context(httpx.Client(base_url=found[1], headers={"authorization": f"Bearer {MARK}-agent"}))
        call = "/rollout/r/attempt/a/v1/chat/completions"
        answers = [httpx.get(f"{found[1]}/api/health"), client.post(call, json=chat_body())]
        answers += [client.post(call, json=chat_body(model="gone")), client.get("/v1/models"), client.get("/nowhere")]
        answers.append(client.post(call, content=b"{", headers={"cookie": MARK, "api-key": MARK}))
        assert [answer.status_code for answer in answers] == [200, 200, 503, 200, 403, 400]
    texts = [f"{answer.text} {answer.headers}" for answer in answers]
    assert "127.0.0.1:9" in texts[0] and [text for text in texts if MARK in text] == []
    assert {headers["authorization"] for headers in engine.headers} == {"Basic bWU6cGw0bnRlZA=="}  # me:pl4nted
    assert MARK not in f"{engine.headers} {engine.seen}"
    assert found_in(desk, ["config.yaml", "tokens"]) == []
