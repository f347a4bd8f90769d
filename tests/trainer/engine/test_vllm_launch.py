"""`vllm serve` as a child of the training, with a program that stands for it. Real vLLM is started in tests/vllm."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from agl.config import Config, GatewayConfig, LaunchConfig
from agl.errors import ConfigError, TrainingError
from agl.server_thread import ServerThread
from agl.store import open_store
from agl_trainer import Trainer
from agl_trainer.engine.vllm.launch import RunningVllm, free_port, running_vllm, serve_command
from agl_trainer.engine.vllm.server import VllmServer
from agl_trainer.loop.engines import _asleep, _control, _paused, serve_policies

TOY = "tests.flows.toy_agent"
FAKE = Path(__file__).with_name("fake_vllm_program.py")
NEEDS: dict[str, Any] = {"max_model_len": 1024, "ranks": [16, 24], "versions": 3, "chat_template": "chat.jinja"}


def launch_config(folder: Path, **options: Any) -> LaunchConfig:
    """It launches the fake."""
    program = folder / "vllm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    program.chmod(0o755)
    environment = {"FAKE_VLLM_RECORD": str(folder / "record")}
    return LaunchConfig.model_validate({"program": str(program), "environment": environment, "timeout_s": 60} | options)


@contextmanager
def launched(folder: Path, **options: Any) -> Iterator[RunningVllm]:
    launch, port = launch_config(folder, **options), free_port()
    command = serve_command(launch, Path("model"), "base", port=port, **NEEDS)
    with running_vllm(command, launch, port, folder / "out" / "vllm.log", lambda: None) as vllm:
        yield vllm


def recorded(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "record").read_text().splitlines()]


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def test_vllm_is_started_with_what_a_training_needs_and_ended_with_it(tmp_path: Path) -> None:
    with launched(tmp_path, sleep=True, gpu_memory_utilization=0.3, options=["--seed", "7"]) as vllm:
        (start,) = recorded(tmp_path)
        assert vllm.url.startswith("http://127.0.0.1:") and vllm.url.endswith("/v1") and is_running(start["process"])
        vllm.check()
    assert not is_running(start["process"])
    serve, model, *options = start["arguments"]
    assert (serve, model) == ("serve", "model")
    pairs = " ".join(options)
    for pair in (
        "--served-model-name base",
        "--max-model-len 1024",
        "--gpu-memory-utilization 0.3",
        "--max-lora-rank 32",  # the next that vLLM accepts
        "--max-loras 7",  # three versions of two adapters, and an amplified one
        "--logprobs-mode processed_logprobs",
        "--chat-template chat.jinja",
        "--enable-lora --enable-sleep-mode --seed 7",
    ):
        assert pair in pairs
    given = start["environment"]
    assert given["FAKE_VLLM_RECORD"] not in str(launch_config(tmp_path).model_dump())
    assert given["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True" and given["VLLM_SERVER_DEV_MODE"] == "1"


def test_the_end_of_its_log_is_shown_if_it_dies_or_does_not_answer(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"ended with exit code 3; the end of .*vllm.log:\nline 10\n") as died:  # noqa: SIM117
        with launched(tmp_path, options=["--cannot-load"]):
            raise AssertionError
    assert "line 29" in str(died.value) and "line 9\n" not in str(died.value)
    with pytest.raises(TrainingError, match=r"did not answer within 0.01 s \(engine.launch.timeout_s\)"):  # noqa: SIM117
        with launched(tmp_path, timeout_s=0.01):
            raise AssertionError


def test_a_vllm_that_dies_during_the_training_is_not_waited_for(tmp_path: Path) -> None:
    """Whatever noticed it first: the engine that waits for a restart, or a request that fails."""
    for notice in ("wait", "models"):
        with pytest.raises(TrainingError, match=r"vLLM ended with exit code -9; the end of .*vllm.log") as died:  # noqa: SIM117
            with launched(tmp_path) as vllm, VllmServer(vllm.url) as server:
                vllm.process.kill()
                vllm.process.wait()
                server.wait(600.0, vllm.check) if notice == "wait" else server.models()
        assert isinstance(died.value.__context__, TrainingError)  # what it caused is kept


def test_it_ends_when_the_training_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom tests.trainer.engine.test_vllm_launch import launched\n"
        "with launched(Path(sys.argv[1])):\n    print('runs', flush=True)\n    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    training = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
    assert training.stdout and training.stdout.readline() == b"runs\n"
    (start,) = recorded(tmp_path)
    assert is_running(start["process"])
    training.kill()
    training.communicate()
    while is_running(start["process"]):  # the test's own timeout ends this
        time.sleep(0.02)


def test_what_cannot_be_launched_is_said_before(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine.launch.program: no program nowhere/vllm; pip install vllm"):
        serve_command(LaunchConfig(program="nowhere/vllm"), tmp_path, "base", port=1, **NEEDS)
    config = Config.parse({"engine": "vllm", "train": {"model": "tiny"}})
    with (
        closing(open_store(f"sqlite:///{tmp_path}/agl.db")) as store,
        pytest.raises(ConfigError, match=r"no server is named: set gateway.upstream .*, or engine.launch"),
        serve_policies(config, store, None, lambda _: None),
    ):
        raise AssertionError
    needs: dict[str, Any] = NEEDS | {"ranks": [8, 1024]}
    with pytest.raises(ConfigError, match=r"adapters up to rank 512, and lora_r is 1024"):
        serve_command(launch_config(tmp_path), tmp_path, "base", port=1, **needs)


def test_the_page_is_announced_and_answers_before_vllm_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = launch_config(tmp_path, options=["--cannot-load"]).model_dump()
    launch["environment"] = {name: value.get_secret_value() for name, value in launch["environment"].items()}
    train = {"model": "tiny", "agent": f"{TOY}:answer", "tasks": f"{TOY}:tasks", "output_dir": str(tmp_path / "run")}
    uri = f"sqlite:///{tmp_path}/agl.db"
    config = Config.parse(
        {"engine": {"kind": "vllm", "launch": launch}, "store_uri": uri, "agent_roles": {"writer": {}}, "train": train}
    )
    seen: list[tuple[int, bool]] = []

    def visit(server: ServerThread) -> None:
        seen.append((httpx.get(f"{server.base_url}/runs").status_code, (tmp_path / "record").exists()))

    with closing(open_store(uri)) as store:
        with pytest.raises(TrainingError, match="vLLM ended with exit code 3"):  # noqa: SIM117
            with serve_policies(config, store, None, visit):
                raise AssertionError
        capsys.readouterr()
        assert seen == [(200, False)] and (tmp_path / "record").exists()
    with pytest.raises(TrainingError, match="vLLM ended with exit code 3"), Trainer(config).open():
        raise AssertionError
    assert capsys.readouterr().err.startswith("page: http://127.0.0.1:")


def test_vllm_sleeps_while_the_policy_trains_and_calls_wait(tmp_path: Path) -> None:
    with (
        closing(open_store(f"sqlite:///{tmp_path}/agl.db")) as store,
        ServerThread(store, port=0, otlp_http_port=0, gateway=GatewayConfig()) as gateway,
        launched(tmp_path, sleep=True) as vllm,
        VllmServer(vllm.url) as server,
    ):
        for error in (None, KeyError):
            try:
                with _paused(gateway.base_url), _asleep([server]):
                    assert recorded(tmp_path)[-1] == "/sleep?level=1"
                    assert is_paused(gateway.base_url)
                    if error:
                        raise error
            except KeyError:
                pass
            assert recorded(tmp_path)[-1] == "/wake_up" and not is_paused(gateway.base_url)
        with pytest.raises(TrainingError, match="the gateway refused pause"):
            _control(gateway.base_url, "POST", "pause", {"drain_s": -1})


def is_paused(gateway: str) -> bool:
    return bool(httpx.get(f"{gateway}/api/gateway").json()["paused"])
