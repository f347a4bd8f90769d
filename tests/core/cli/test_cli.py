"""The installed `agl` program, in a separate process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from agl import otlp, semconv
from agl.server.app_thread import AppThread
from agl.span import Span
from agl.store import AttemptState, Rollout, open_store, span_row
from agl.tokens.drift import Difference, Drift, Drifted
from agl.trajectory import DropReason, build_trajectory, trained_span
from tests.core.fake_engine import FakeEngine
from tests.core.span_maker import chat, gateway_call, reward, span
from tests.core.whole_request import whole_request
from tests.ports import free_port

AGL = Path(sys.executable).with_name("agl")
COMMANDS = [
    ["init"],
    ["serve"],
    ["inspect"],
    ["rollouts"],
    ["trajectories"],
    ["spans", "export"],
    ["spans", "import"],
    ["store", "count"],
    ["store", "gc"],
    ["store", "backup"],
    ["store", "check"],
    ["store", "migrate"],
    ["config", "show"],
    ["doctor"],
]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def agl(*arguments: str, stdin: str | None = None, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run(
        [AGL, *arguments], input=stdin, capture_output=True, text=True, timeout=60, check=False, env=environment
    )


def stdout_of(*arguments: str, **options: Any) -> str:
    """stdout of a command that succeeds."""
    done = agl(*arguments, **options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def error_of(*arguments: str, **options: Any) -> str:
    """stderr of a command that cannot run: exit code 2, no traceback, nothing on stdout."""
    done = agl(*arguments, **options)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    return done.stderr


def keep(*spans: Span, uri: str = "sqlite:///agl.db") -> None:
    with closing(open_store(uri)) as store:
        store.append_spans(spans)


def rollout_spans() -> list[Span]:
    root = span(semconv.SPAN_ROLLOUT, {semconv.MODE: "train"})
    asked = chat(root, {semconv.ROLE: "writer"})
    return [root, asked, gateway_call([1, 2], [3, 4], parent=asked), chat(root), reward(0.8, parent=root)]


# --- The program ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(command: list[str]) -> None:
    text = stdout_of(*command, "--help")
    assert f"example:\n  agl {' '.join(command)}" in text


def test_help_lists_our_commands_and_those_of_plug_ins() -> None:
    text = stdout_of("--help")
    listed = set(re.findall(r"^    (\w+)", text, re.MULTILINE))
    assert {"serve", "inspect", "trajectories", "spans", "store", "config", "doctor"} <= listed
    assert {"train", "sft", "eval", "demo"} <= listed
    assert re.search(r"^    train +train the adapters", text, re.MULTILINE)
    assert {len(line) > 80 for line in text.splitlines()} == {False}


@pytest.mark.parametrize("command", ["adapters", "spans", "store", "config"])
def test_help_of_a_command_lists_its_verbs_with_what_they_do(command: str) -> None:
    verbs = stdout_of(command, "--help").partition("VERB\n")[2].splitlines()
    assert verbs and all(re.match(r"    \w+ +\w+|     ", line) for line in verbs), verbs


def test_the_package_runs_as_the_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agl", "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == stdout_of("--help")


def test_a_wrong_command_or_option_exits_with_2() -> None:
    assert "invalid choice: 'nope'" in error_of("nope")
    assert "there is no option --upstraem; did you mean --upstream?" in error_of("serve", "--upstraem", "x")
    assert "agl inspect: error: there is no option --config" in error_of("inspect", "--last", "--config", "x")
    assert "agl inspect: error: there is no option -z" in error_of("inspect", "-z", "x")
    assert "agl: error: there is no option --store" in error_of("--store", "x", "inspect")
    assert "agl store gc: error: there is no option --older" not in error_of("store", "gc", "--older", "x")
    assert "required" in error_of()


def test_reading_a_store_loads_neither_torch_nor_a_server() -> None:
    keep(*rollout_spans())
    code = (
        "import sys; from agl.cli import main; main(['inspect', '--last']); "
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(done.stderr.split())
    assert "agl" in loaded
    assert not {"torch", "starlette", "uvicorn", "aiohttp", "agl_trainer", "langchain_core"} & loaded


def install_plugin(folder: Path, code: str, entry_points: str) -> None:
    (folder / "demo_plugin.py").write_text(code)
    info = folder / "demo_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: demo-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)


def test_a_plug_in_command_is_imported_only_when_it_runs(tmp_path: Path) -> None:
    code = """
print("imported")
def register(subparsers):
    parser = subparsers.add_parser("hello")
    parser.add_argument("name")
    parser.set_defaults(run=lambda arguments: print("hello", arguments.name) or 1)
"""
    install_plugin(tmp_path, code, "[agl.commands]\nhello = demo_plugin:register\nserve = demo_plugin:register\n")
    assert re.search(r"^    hello +\(from demo-plugin\)$", stdout_of("--help", path=tmp_path), re.MULTILINE)
    assert "imported" not in stdout_of("serve", "--help", path=tmp_path)
    done = agl("hello", "you", path=tmp_path)
    assert (done.returncode, done.stdout.splitlines()) == (1, ["imported", "hello you"])


def test_a_plug_in_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    install_plugin(tmp_path, "import not_there", "[agl.commands]\nhello = demo_plugin:register\n")
    assert "the command 'hello' cannot be loaded" in stdout_of("--help", path=tmp_path)
    message = error_of("hello", path=tmp_path)
    assert message.startswith("agl: the command 'hello' cannot be loaded (demo_plugin:register)")
    assert "not_there" in message


def test_output_into_a_closed_pipe_is_not_an_error() -> None:
    # More than a pipe holds, so that the program is still writing when its reader leaves.
    keep(*(span(f"step {number} {'x' * 50}") for number in range(3000)))
    process = subprocess.Popen([AGL, "inspect", "--last"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith("rollout r-1")
    process.stdout.close()
    assert process.wait(30) == 0
    assert process.stderr.read() == ""
    process.stderr.close()


# --- inspect and trajectories ---------------------------------------------------------------------------------------


def test_inspect_prints_the_tree_of_the_named_or_last_rollout() -> None:
    keep(*rollout_spans())
    keep(span("other", {semconv.ROLLOUT_ID: "r-2"}))
    text = stdout_of("inspect", "r-1")
    assert text.startswith("rollout r-1  mode train\nreward 0.8\n")
    assert "row 1, not trained yet" in text
    assert "dropped: no_ids" in text
    assert "point the model's base URL at the gateway" in text
    assert stdout_of("inspect", "--last").startswith("rollout r-2")


def test_inspect_as_json() -> None:
    keep(*rollout_spans())
    calls = json.loads(stdout_of("inspect", "--last", "--json"))["calls"]
    assert [(call["role"], call["row"], (call["drop"] or {}).get("reason")) for call in calls] == [
        ("writer", 1, None),
        ("default", None, "no_ids"),
    ]


def test_inspect_names_what_is_missing_and_creates_no_store() -> None:
    message = error_of("inspect", "--last")
    assert "there is no store at" in message
    assert not Path("agl.db").exists()
    Path("runs/demo").mkdir(parents=True)
    keep(uri="sqlite:///runs/demo/agl.db")
    assert "there are --store sqlite:///runs/demo/agl.db" in error_of("inspect", "--last")
    assert "holds no spans yet" in error_of("inspect", "--last", "--store", "sqlite:///runs/demo/agl.db")
    keep(*rollout_spans())
    assert "no span of rollout 'r-9'; the last one there is r-1" in error_of("inspect", "r-9")
    assert "required" in error_of("inspect")


@pytest.mark.parametrize("uri", ["mysql://x", "sqlite:///not_a_store"])
def test_a_store_that_does_not_open_is_named(uri: str) -> None:
    Path("not_a_store").write_text("just text, and rather more of it than a header would need\n" * 20)
    assert uri.removeprefix("sqlite:///") in error_of("store", "count", "--store", uri)


def test_trajectories_as_json_hold_rows_and_every_drop() -> None:
    spans = rollout_spans()
    keep(*spans)
    data = json.loads(stdout_of("trajectories", "--rollout", "r-1", "--json"))
    (row,) = data["rows"]
    expected = build_trajectory(spans).rows[0]
    assert (row["token_ids"], row["loss_mask"], row["logprobs"]) == ([1, 2, 3, 4], [0, 0, 1, 1], [0.0, 0.0, -0.5, -0.5])
    assert (row["role"], row["version"], row["reward"]) == ("writer", "writer@3", 0.8)
    assert row["call_ids"] == expected.call_ids
    (drop,) = data["drops"]
    assert (drop["rollout_id"], drop["reason"]) == ("r-1", "no_ids")
    assert data["rollouts"][0]["calls"] == 2


def test_trajectories_of_a_group_are_those_of_its_rollouts() -> None:
    with closing(open_store("sqlite:///agl.db")) as store:
        store.enqueue_rollouts([Rollout(name, None, group_id="task-17") for name in ("r-1", "r-2", "r-3")])
        for name in ("r-1", "r-2"):
            store.append_spans([gateway_call(attributes={semconv.ROLLOUT_ID: name})])
    data = json.loads(stdout_of("trajectories", "--group", "task-17", "--json"))
    assert [row["rollout_id"] for row in data["rows"]] == ["r-1", "r-2"]
    table = stdout_of("trajectories", "--group", "task-17")
    assert "2 rollouts, 2 rows, 0 dropped calls" in table
    assert "no rollout of group 'task-18'" in error_of("trajectories", "--group", "task-18")


def test_trajectories_as_a_table_show_drops_with_what_to_do() -> None:
    keep(*rollout_spans())
    head, row, _, drop, counts = stdout_of("trajectories", "--last").splitlines()
    assert head.split() == ["rollout", "role", "policy", "tokens", "sampled", "trained", "calls", "reward"]
    assert row.split() == ["r-1", "writer", "writer@3", "4", "2", "0", "1", "0.8"]
    assert "no_ids: set return_token_ids" in drop
    assert counts == "1 rollout, 1 row, 1 dropped call"


def test_trajectories_count_a_token_as_trained_only_once_a_step_trained_it() -> None:
    first, second = gateway_call([1], [2, 3]), gateway_call([7], [8])
    one, other = build_trajectory([first, second]).calls
    keep(first, second, trained_span(one, 1, None, DropReason.ZERO_ADVANTAGE), trained_span(other, 1, 0.5))
    _, *rows, _, counts = stdout_of("trajectories", "--last").splitlines()
    assert [row.split()[3:6] for row in rows] == [["3", "2", "0"], ["2", "1", "1"]]  # tokens, sampled, trained
    assert counts == "1 rollout, 2 rows, 0 dropped calls; not trained: 1 call zero_advantage"
    assert [row["trained"] for row in json.loads(stdout_of("trajectories", "--last", "--json"))["rows"]] == [[0], [1]]
    keep(trained_span(one, 2, 0.25))
    assert stdout_of("trajectories", "--last").splitlines()[1].split()[3:6] == ["3", "2", "2"]


def test_trajectories_print_the_first_token_in_which_a_history_differs() -> None:
    first = gateway_call([1], [2, 3])
    drifted = Drifted(Drift.WHITESPACE, Difference(1, 2, 9, " ", "\n"), first.span_id)
    second = gateway_call([1, 9, 4], [5], attributes={semconv.GATEWAY_DRIFT: drifted.to_json()})
    keep(first, second)
    difference_text = "token 1: 2 ' ' was sampled, the prompt has 9 '\\n'"
    assert f"r-1 writer {second.span_id}: whitespace: {difference_text}" in stdout_of("trajectories", "--last")
    rows = json.loads(stdout_of("trajectories", "--last", "--json"))["rows"]
    difference = {"position": 1, "sampled": 2, "prompt": 9, "sampled_text": " ", "prompt_text": "\n"}
    assert [(row["drift"], row["difference"]) for row in rows] == [([None], [None]), (["whitespace"], [difference])]
    (call,) = [call for call in json.loads(stdout_of("inspect", "--last", "--json"))["calls"] if call["drift"]]
    assert (call["drift"], call["difference"], call["prefix"]) == ("whitespace", difference, None)


# --- spans and store ------------------------------------------------------------------------------------------------


def test_spans_go_from_one_store_to_another_and_stay_the_same() -> None:
    spans = [*rollout_spans(), *(span(f"step {number}") for number in range(150))]
    keep(*spans)
    lines = stdout_of("spans", "export", "--last")
    assert [len(otlp.decode_json(line)) for line in lines.splitlines()] == [100, 55]
    Path("spans.jsonl").write_text(lines)
    other = ("--store", "sqlite:///other.db")
    assert (
        stdout_of("spans", "import", "spans.jsonl", *other) == "155 spans read, 155 of them new in sqlite:///other.db\n"
    )
    assert json.loads(stdout_of("spans", "import", "-", "--json", *other, stdin=lines)) == {"read": 155, "new": 0}
    with closing(open_store("sqlite:///other.db")) as store:
        assert store.query_spans("r-1") == sorted(spans, key=lambda one: one.start_ns)


def test_an_export_keeps_every_field_of_otlp() -> None:
    """Links, trace state, flags, counts of what was dropped, versions and attributes of scopes, schemas."""
    request = whole_request()
    with closing(open_store("sqlite:///agl.db")) as store:
        store.append_rows(span_row.parse(request.SerializeToString()).rows)
    Path("spans.jsonl").write_text(stdout_of("spans", "export", "--last"))
    stdout_of("spans", "import", "spans.jsonl", "--store", "sqlite:///other.db")
    with closing(open_store("sqlite:///other.db")) as store:
        (kept,) = store.query_rows(str(store.last_rollout_id()))
    assert ExportTraceServiceRequest.FromString(kept) == request
    assert request.resource_spans[0].scope_spans[0].spans[0].links[0].trace_state


def test_an_import_names_an_invalid_line_and_can_be_repeated() -> None:
    lines = [otlp.encode_json([span("one")]), "", "not JSON", otlp.encode_json([span("two")])]
    Path("spans.jsonl").write_text("\n".join(lines))
    assert "spans.jsonl:3: the body is not" in error_of("spans", "import", "spans.jsonl")
    assert stdout_of("store", "count") == "1\n"
    Path("spans.jsonl").write_text("\n".join([*lines[:2], *lines[3:]]))
    assert stdout_of("spans", "import", "spans.jsonl").startswith("2 spans read, 1 of them new")
    assert "cannot read nowhere.jsonl: No such file" in error_of("spans", "import", "nowhere.jsonl")


def test_store_count_prints_the_number_and_nothing_else() -> None:
    keep(*rollout_spans())
    assert stdout_of("store", "count", "--store", "sqlite:///agl.db") == "5\n"


def test_store_gc_deletes_old_finished_rollouts() -> None:
    for name in ("done", "running"):
        with closing(open_store("sqlite:///agl.db")) as store:
            store.enqueue_rollouts([Rollout(name, None)])
            store.lease_rollout("worker", name)
            store.append_spans([span("step", {semconv.ROLLOUT_ID: name})])
    with closing(open_store("sqlite:///agl.db")) as store:
        store.finish_attempt("done-a1", AttemptState.SUCCEEDED)
    assert stdout_of("store", "gc", "--older-than", "1d", "--max-bytes", "2GB") == (
        "deleted 0 rollouts with 0 spans; 2 spans left\n"
    )
    assert json.loads(stdout_of("store", "gc", "--older-than", "0s", "--json")) == {
        "rollouts": 1,
        "spans": 1,
        "spans_left": 1,
    }
    assert "say what may go: --older-than" in error_of("store", "gc")
    assert "'soon' is not a time such as 7d" in error_of("store", "gc", "--older-than", "soon")
    assert "'2 lots' is not a size such as 2GB" in error_of("store", "gc", "--max-bytes", "2 lots")


def test_store_backup_check_and_migrate() -> None:
    keep(*rollout_spans())
    assert stdout_of("store", "backup", "copy.db") == "sqlite:///agl.db is copied to copy.db\n"
    assert stdout_of("store", "count", "--store", "sqlite:///copy.db") == "5\n"
    assert "copy.db is there already" in error_of("store", "backup", "copy.db")
    assert stdout_of("store", "check", "--store", "sqlite:///copy.db") == "sqlite:///copy.db is sound\n"
    Path("copy.db").write_bytes(Path("copy.db").read_bytes()[:-20_000])
    damaged = agl("store", "check", "--store", "sqlite:///copy.db")
    assert damaged.returncode == 1 and "sqlite:///copy.db is damaged" in damaged.stdout
    assert re.fullmatch(r"sqlite:///agl.db is up to date: schema version \d+\n", stdout_of("store", "migrate"))
    assert "postgresql://x/y is not a SQLite store" in error_of("store", "backup", "a", "--store", "postgresql://x/y")
    assert "there is no store at" in error_of("store", "check", "--store", "sqlite:///nowhere.db")


# --- config ---------------------------------------------------------------------------------------------------------


def test_config_show_prints_the_resolved_tree() -> None:
    Path("config.yaml").write_text("lightning_store_uri: sqlite:///x.db\nagent_roles: {gamma: 0.9, writer: {}}\n")
    text = stdout_of("config", "show", "config.yaml")
    assert "store_uri: sqlite:///x.db" in text
    Path("again.yaml").write_text(text)
    assert stdout_of("config", "show", "again.yaml") == text
    data = json.loads(stdout_of("config", "show", "config.yaml", "--json"))
    assert data["agent_roles"]["gamma"] == 0.9
    assert data["agent_roles"]["writer"]["lora_alpha"] == 32  # a role's default, beside it as in the file


def test_config_show_names_a_wrong_key_and_a_missing_file() -> None:
    Path("config.yaml").write_text("rewardz: {}\n")
    assert "config.yaml: rewardz: unknown key; did you mean 'rewards'?" in error_of("config", "show", "config.yaml")
    assert "cannot read the configuration nowhere.yaml" in error_of("config", "show", "nowhere.yaml")


# --- serve ----------------------------------------------------------------------------------------------------------


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """`agl serve` on free ports: the process, the gateway's and the collector's base URL."""
    process = subprocess.Popen(
        [AGL, "serve", "--port", "0", "--otlp-http-port", "0", "--otlp-grpc-port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        lines = [process.stdout.readline() for _ in range(3)]
        urls = re.findall(r"http://127\.0\.0\.1:\d+", lines[0] + lines[1])
        assert len(urls) >= 3, process.stderr.read()
        yield process, urls[2], urls[0]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.fixture
def engine_url() -> Iterator[str]:
    thread = AppThread()
    url = thread.add(FakeEngine().app)
    with thread:
        yield f"{url}/v1"


def stopped(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    process.send_signal(number)
    assert process.stderr is not None
    return process.wait(20), process.stderr.read()


def test_serve_stores_spans_and_calls_that_inspect_shows(engine_url: str) -> None:
    """Spans of an OTLP client and of a plain HTTP client of the gateway, joined in the tree."""
    asked = chat(attributes={semconv.ROLE: "planner"})
    with serving("--upstream", engine_url) as (process, gateway, collector):
        body = {"model": "writer@3", "messages": [{"role": "user", "content": "hi"}]}
        headers = {"traceparent": f"00-{asked.trace_id}-{asked.span_id}-01"}
        url = f"{gateway}/rollout/r-1/attempt/r-1-a1/v1/chat/completions"
        assert httpx.post(url, json=body, headers=headers).status_code == 200
        answer = httpx.post(
            f"{collector}/v1/traces",
            content=otlp.encode([asked]),
            headers={"content-type": "application/x-protobuf"},
        )
        assert answer.status_code == 200
        tree = stdout_of("inspect", "--last")
        assert stopped(process, signal.SIGTERM) == (0, "")
    assert re.search(r"chat writer +planner", tree)
    assert re.search(r"└─ agl.gateway.call +planner +3\+3 +writer@3 .* row 1", tree)
    (row,) = json.loads(stdout_of("trajectories", "--rollout", "r-1", "--json"))["rows"]
    assert (row["role"], sum(row["loss_mask"]), len(row["token_ids"])) == ("planner", 3, 6)


def test_serve_without_an_engine_rejects_calls_and_ctrl_c_ends_it_silently() -> None:
    with serving() as (process, gateway, _):
        answer = httpx.post(f"{gateway}/v1/chat/completions", json={"model": "writer", "messages": []})
        assert answer.status_code >= 500
        assert "error" in answer.json()
        assert stopped(process, signal.SIGINT) == (130, "")


def test_serve_reads_upstream_and_store_from_the_file(engine_url: str) -> None:
    Path("config.yaml").write_text(f"store_uri: sqlite:///from_file.db\ngateway: {{upstream: '{engine_url}'}}\n")
    with serving("--config", "config.yaml") as (_, gateway, _):
        assert httpx.get(f"{gateway}/v1/models").json()["data"][0]["id"] == "writer@3"
    assert Path("from_file.db").exists()


def test_serve_accepts_spans_over_grpc_with_the_token_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGL_TOKEN", "secret")
    port = str(free_port())
    with serving("--otlp-grpc-port", port), grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        export = channel.unary_unary("/opentelemetry.proto.collector.trace.v1.TraceService/Export")
        with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
            export(otlp.encode(rollout_spans()), timeout=10)
        export(otlp.encode(rollout_spans()), metadata=[("authorization", "Bearer secret")], timeout=10)
    monkeypatch.delenv("AGL_TOKEN")
    assert stdout_of("store", "count") == "5\n"
    assert "pass --token" in error_of("serve", "--host", "0.0.0.0")


def test_serve_names_a_port_in_use_and_a_wrong_upstream() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}" in error_of("serve", "--port", port, "--otlp-http-port", "0")
    assert "the upstream is 'gpt', expected `local` or a base URL" in error_of("serve", "--upstream", "gpt")
    assert not Path("agl.db").exists()  # a failed start leaves no empty store
    keep(*rollout_spans())
    error_of("serve", "--upstream", "gpt")
    assert stdout_of("store", "count") == "5\n"


# --- doctor ---------------------------------------------------------------------------------------------------------


def doctor(*arguments: str, path: Path | None = None) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code and checks by name; ports are free ones unless `arguments` say otherwise."""
    options = ("--port", "--otlp-http-port", "--otlp-grpc-port")
    ports = [part for option in options for part in (option, str(free_port()))]
    done = agl("doctor", "--json", *ports, *arguments, path=path)
    assert done.stderr == ""
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)}


def test_doctor_finds_no_problem_in_a_sound_installation(engine_url: str) -> None:
    keep(*rollout_spans())
    Path("config.yaml").write_text(f"gateway: {{upstream: '{engine_url}'}}\n")
    code, checks = doctor("--config", "config.yaml")
    assert (code, {check["todo"] for check in checks.values()}) == (0, {""})
    assert checks["store"]["found"] == "sqlite:///agl.db holds 5 spans"
    assert checks["engine"]["found"] == f"{engine_url} serves writer@3, base"
    assert checks["agl-core"]["found"] == checks["agl-trainer"]["found"] == "0.1.0"


def test_doctor_names_the_key_that_an_engine_lacks() -> None:
    Path("config.yaml").write_text("gateway: {engines: [{url: 'http://127.0.0.1:9/v1', key_env: NO_SUCH_KEY}]}\n")
    code, checks = doctor("--config", "config.yaml")
    assert (code, checks["engine"]["found"]) == (1, "http://127.0.0.1:9/v1")
    assert checks["engine"]["todo"].startswith("set the variable: the environment has no NO_SUCH_KEY")


def test_doctor_creates_no_store() -> None:
    code, checks = doctor("--store", "sqlite:///runs/new/agl.db")
    assert (code, checks["store"]["found"]) == (0, "sqlite:///runs/new/agl.db will be made")
    assert not Path("runs").exists()


def greet(listener: socket.socket) -> None:
    """Answer the two requests of `agl doctor` as a server of another protocol."""
    for _ in range(2):
        peer, _ = listener.accept()
        with peer:
            peer.recv(4096)
            peer.sendall(b"SSH-2.0-other\r\n")


def test_doctor_names_each_problem_with_what_to_do() -> None:
    Path("agl.db").write_text("no store, but long enough to look at\n" * 20)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        Path("config.yaml").write_text(f"gateway: {{upstream: 'http://127.0.0.1:{port}/v1'}}\n")
        threading.Thread(target=greet, args=(taken,), daemon=True).start()
        code, checks = doctor("--config", "config.yaml", "--port", str(port))
    assert code == 1
    assert {name for name, check in checks.items() if not check["ok"]} == {f"port {port}", "store", "engine"}
    assert "--port" in checks[f"port {port}"]["todo"]
    assert re.search(r"gateway\.upstream.*does not speak HTTP.*SSH-2.0-other", checks["engine"]["todo"])
    assert "agl.db" in checks["store"]["todo"]


def test_doctor_recognises_a_running_server() -> None:
    with serving() as (_, gateway, collector):
        ports = ("--port", gateway.rpartition(":")[2], "--otlp-http-port", collector.rpartition(":")[2])
        code, checks = doctor(*ports)
    assert code == 0
    assert [check["found"] for name, check in checks.items() if name.startswith("port")] == [
        "in use by a running `agl serve`",
        "in use by a running `agl serve`",
        "free",
    ]


def test_doctor_runs_the_checks_of_plug_ins_and_survives_a_broken_one(tmp_path: Path) -> None:
    code = """
from agl.cli.doctor import Check
def check(config):
    yield Check("toner", "low", "buy some")
def broken(config):
    raise RuntimeError("oops")
"""
    install_plugin(tmp_path, code, "[agl.checks]\ntoner = demo_plugin:check\nbad = demo_plugin:broken\n")
    exit_code, checks = doctor(path=tmp_path)
    assert exit_code == 1
    assert checks["toner"] == {"name": "toner", "found": "low", "todo": "buy some", "ok": False}
    assert "RuntimeError: oops" in checks["bad"]["found"]
    lines = agl("doctor", path=tmp_path).stdout.splitlines()
    assert any(re.fullmatch(r"problem +toner +low; buy some", line) for line in lines)


def test_a_full_disk_is_one_line() -> None:
    Path("config.yaml").write_text("agent_roles: {writer: {}}\n")
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run([AGL, "config", "show", "config.yaml"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert ended.stderr.startswith("agl: cannot write the output or a file: No space left on device; make room")


def test_a_url_in_the_wrong_place_hides_its_password() -> None:
    assert "unrecognized arguments: http://***@h:1" in error_of("store", "count", "http://SECRET@h:1")
