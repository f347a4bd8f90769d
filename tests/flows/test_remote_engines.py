"""Engines on other machines: each has a folder of its own, and `agl engine` beside it. Programs stand for vLLM."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from safetensors.torch import load_file
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from agl import semconv
from agl.cli import main
from agl.config import Config
from agl.errors import TrainingError
from agl.server.app_thread import AppThread
from agl.store import RolloutState, Store, open_store
from agl.store.files import digest_of
from agl.store.sqlite.store import SqliteStore
from agl_trainer import Trainer
from agl_trainer.engine.vllm import keeper
from agl_trainer.engine.vllm.fleet import Fleet
from agl_trainer.engine.vllm.registry import Wanted, engine_prefix, put_wanted
from agl_trainer.loop.engines import open_engine
from agl_trainer.loop.policy_setup import base_folder, fingerprint_of
from agl_trainer.model.base_model import load_model
from agl_trainer.model.device import best_device
from agl_trainer.model.policy import Policy
from tests.flows.test_training import TRAIN
from tests.ports import free_port
from tests.trainer.engine.served_policy import ServedPolicy
from tests.waiting import wait_until

PROGRAM = Path(__file__).with_name("remote_vllm.py")
COMMAND = "import sys; from agl.cli import main; sys.exit(main())"
ROLE = "solver"


@dataclass
class Brain:
    """Computes what the adapters of all these servers say: chats with one policy, logprobs with another."""

    chat: Any
    policy: Any
    served: ServedPolicy
    _name: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def app(self) -> Starlette:
        routes = [Route("/v1/completions", self._logprobs, methods=["POST"]), Mount("/", self._chat)]
        return Starlette(routes=routes)

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = json.loads((await receive())["body"])
        await run_in_threadpool(self._use, body["model"], body.pop("path"))
        data = json.dumps(body | {"model": ROLE}).encode()
        sent = iter([{"type": "http.request", "body": data, "more_body": False}])

        async def replay() -> Any:
            return next(sent, None) or await receive()

        kept = [pair for pair in scope["headers"] if pair[0] != b"content-length"]
        await self.chat({**scope, "headers": [*kept, (b"content-length", str(len(data)).encode())]}, replay, send)

    def _use(self, name: str, path: str) -> None:
        with self._lock:
            if name != self._name:
                self.policy.load_adapter(
                    ROLE, load_file(Path(path, "adapter_model.safetensors")), int(name.partition("@")[2])
                )
                self._name = name

    async def _logprobs(self, request: Request) -> JSONResponse:
        body = await request.json()
        return JSONResponse({"choices": await run_in_threadpool(self._choices, body)})

    def _choices(self, body: dict[str, Any]) -> list[Any]:
        name, path = body["model"], body["path"]
        with self._lock:
            self.served.loaded.clear()
            if path:
                alpha = json.loads(Path(path, "adapter_config.json").read_text())["lora_alpha"]
                factor = alpha / self.served.policy.adapter_config(ROLE)["lora_alpha"]
                self.served.load(name, Path(path), factor)
            found = self.served.next_logprobs(name, body["prompt"])
        return [
            {
                "index": index,
                "logprobs": {
                    "top_logprobs": [{f"token_id:{token}": value / body["temperature"] for token, value in top.items()}]
                },
            }
            for index, top in enumerate(found)
        ]


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """`agl engine` sets handlers for its process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@contextmanager
def running_brain(config: Config) -> Iterator[str]:
    server = AppThread()
    (base,) = config.bases()
    with open_engine(config, base) as (policy, _, app):
        model, tokenizer = load_model(base_folder(config, base), best_device())
        served = Policy(model, tokenizer, config.require_roles(), base_name="small", seed=0, packs=False)
        url = server.add(Brain(app, policy, ServedPolicy("brain", served)).app())
        with server:
            yield url


class Machine:
    """An engine and `agl engine` beside it, with a folder of their own."""

    def __init__(self, config: Path, store: str, brain: str, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._vllm = [sys.executable, str(PROGRAM), str(self.port), brain, str(folder)]
        options = ["--store", store, "--url", self.url, "--folder", str(folder)]
        self._agl = [sys.executable, "-c", COMMAND, "engine", str(config), *options]
        self.processes: list[subprocess.Popen[bytes]] = []
        folder.mkdir()

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            for command in (self._vllm, self._agl):
                self.processes.append(subprocess.Popen(command, stdout=log, stderr=log))

    def kill(self) -> None:
        for process in self.processes[::-1]:
            process.kill()
            process.wait()
        self.processes.clear()

    def drained(self) -> int:
        """Exit code of `agl engine` after SIGTERM."""
        self.processes[1].terminate()
        return self.processes[1].wait(200)

    def requests(self) -> list[str]:
        path = self.folder / "requests"
        return path.read_text().split() if path.exists() else []

    def chats(self) -> int:
        return sum(path.endswith("/chat/completions") for path in self.requests())


def remote_config(folder: Path) -> Config:
    return Config.parse(
        {
            "store_uri": f"sqlite:///{folder / 'agl.db'}",
            "agent_roles": {"gamma": 1.0, ROLE: {"lora_r": 8}},
            "engine": {"kind": "remote", "lease_s": 60, "max_model_len": 96},
            "gateway": {"health_s": 0.2, "backoff_s": 0.05},
            "train": TRAIN | {"output_dir": str(folder / "run"), "port": free_port(), "timeout_s": 300},
        }
    )


def upstreams(store: Store, step: int) -> list[str | None]:
    ids = [f"run-{step:05d}-g{group}-r{rollout}" for group in range(4) for rollout in range(4)]
    spans = [span for name in ids for span in store.query_spans(name) if span.name == semconv.SPAN_GATEWAY_CALL]
    assert len(spans) == 16 and {span.status for span in spans} <= {"ok", "unset"}
    return [span.text(semconv.GATEWAY_UPSTREAM) for span in spans]


def test_an_engine_killed_in_mid_step_loses_no_rollout_and_is_used_again(tmp_path: Path) -> None:
    config = remote_config(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    with ExitStack() as stack:
        brain = stack.enter_context(running_brain(config))
        store_url = f"http://127.0.0.1:{config.require_train().port}"
        machines = [Machine(path, store_url, brain, tmp_path / name) for name in ("one", "two")]
        stack.callback(lambda: [machine.kill() for machine in machines])
        for machine in machines:
            (machine.folder / "hold").touch()
            machine.start()
        killed: list[Machine] = []

        def kill_one() -> None:
            wait_until(lambda: any(machine.chats() for machine in machines), 200)
            victim = next(machine for machine in machines if machine.chats())
            victim.kill()
            (victim.folder / "requests").unlink()
            victim.start()
            wait_until(lambda: "/v1/load_lora_adapter" in victim.requests(), 200)
            killed.append(victim)
            for machine in machines:
                (machine.folder / "hold").unlink()

        killer = threading.Thread(target=kill_one)
        killer.start()
        trainer = Trainer(config)
        with trainer.open():
            registered = trainer.session.store.query_resources
            wait_until(lambda: len(registered(engine_prefix("run"))) == 2, 200)
            trainer.grpo()
            killer.join()
            assert machines[0].drained() == 0 and not (machines[0].folder / "adapters").exists()
            listed = httpx.get(f"{store_url}/api/health").json()["engines"]
            assert [engine["url"] for engine in listed] == [machines[1].url]
        with closing(open_store(config.store_uri)) as store:
            assert store.count_rollouts()[RolloutState.SUCCEEDED] == 48 == sum(store.count_rollouts().values())
            used = [set(upstreams(store, step)) for step in (1, 2, 3)]
            (victim,) = killed
            assert used[0] == {machine.url for machine in machines} - {victim.url}
            assert victim.url in used[1] | used[2]
            left = [resource.name for resource in store.query_resources() if resource.name.startswith("files of")]
        assert left == []


# --- What is wrong is said beside the engine -------------------------------------------------------------------------


def engine_of(folder: Path, *options: str, **engine: Any) -> list[str]:
    """Arguments of `agl engine` for the configuration in `folder`."""
    data = yaml.safe_load(remote_config(folder).to_yaml())
    (folder / "config.yaml").write_text(yaml.safe_dump(data | {"engine": data["engine"] | engine}))
    return ["engine", str(folder / "config.yaml"), "--patience", "0.1s", *options]


def test_an_engine_that_cannot_begin_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    rows: list[tuple[list[str], dict[str, Any], str]] = [
        ([], {"kind": "local"}, "no engine of this configuration is remote: set engine.kind"),
        (["--model", "large"], {}, "--model is large; engines of these base models are remote: tiny"),
        ([], {"key_env": "NO_SUCH_KEY"}, "the environment has no NO_SUCH_KEY, which engine.key_env names"),
        (["--url", "gpu:8000"], {}, "--url is gpu:8000, expected a base URL, http://HOST:PORT/v1"),
        (["--url", "http://me:pw@gpu/v1"], {}, "has a user, which the training does not know: set engine.key_env"),
        (["--folder", str(tmp_path / "file" / "x")], {}, "cannot write to --folder"),
        (["--run", "other"], {}, "no training with engine.kind: remote uses the run 'other'"),
        (["--host", "0.0.0.0"], {}, "others can reach vLLM at --host 0.0.0.0: set engine.key_env"),
        ([], {}, "train.model tiny is another model here than where the training runs: its weights differ"),
    ]
    config = remote_config(tmp_path)
    with closing(open_store(config.store_uri)) as store:
        here = fingerprint_of(config, config.bases()[0])
        put_wanted(store, "run", Wanted(base=here | {"weights": "other"}, roles=(ROLE,)))
        for options, engine, expected in rows:
            assert main(engine_of(tmp_path, *options, **engine)) == 2, expected
            assert expected in " ".join(capsys.readouterr().err.split())


class Damaging(SqliteStore):
    """Returns other parts than those that were stored."""

    def get_resource_part(self, name: str, version: int, digest: str) -> bytes | None:
        return b"other"


def test_an_engine_that_the_training_cannot_use_ends_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It cannot be reached, or what it fetched is damaged. Adapters of others in its folder stay."""
    monkeypatch.setattr(keeper, "_LOOK_S", 0.01)
    app = Starlette(routes=[Route("/v1/models", lambda _: JSONResponse({"data": [{"id": "small"}]}))])
    server, adapter = AppThread(), tmp_path / "adapter@1"
    url = server.add(app)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    of_a_run = tmp_path / "run" / "adapters" / "solver@3"
    of_a_run.mkdir(parents=True)
    folder = ["--folder", str(tmp_path / "run")]
    with server, closing(open_store(f"sqlite:///{tmp_path / 'agl.db'}")) as store:
        wanted, used = Wanted(base={}, roles=(ROLE,)), list[str]()
        with Fleet(store, "run", wanted, lease_s=60, headers={}, on_use=used.append, on_drop=used.remove) as fleet:
            for host, expected in (
                ("127.0.0.2", "vLLM at http://127.0.0.2:"),
                ("127.0.0.1", f"is damaged: its SHA-256 is {digest_of(b'other')}"),
            ):
                if host == "127.0.0.1":
                    monkeypatch.setattr("agl.store.sqlite.store.SqliteStore", Damaging)

                def train() -> None:
                    wait_until(lambda: bool(fleet.arrivals()))
                    (arrived,) = fleet.arrivals()
                    try:
                        arrived.models()
                        arrived.load("adapter@1", adapter)
                    except TrainingError as error:
                        fleet.refuse(arrived, str(error))

                training = threading.Thread(target=train)
                training.start()
                assert main(engine_of(tmp_path, "--url", f"{url}/v1", "--address", host, *folder)) == 2
                training.join()
                printed = capsys.readouterr().err
                assert "the training does not use this engine: " in printed and expected in printed
                assert list(of_a_run.parent.iterdir()) == [of_a_run]
