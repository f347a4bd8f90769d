"""A training on a Ray of this machine alone: killed actors cost nothing, and what a cluster lacks is named."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from agl.cli import main
from agl.config import Config
from agl.errors import ConfigError
from agl.store import AttemptState, Store, open_store
from agl_trainer.cluster.deaths import Deaths
from agl_trainer.cluster.driver import _check_same
from agl_trainer.cluster.plan import Plan
from agl_trainer.cluster.worker import Address
from tests.waiting import is_alive, wait_until

ROOT = Path(__file__).parents[2]
TOY = "tests.flows.toy_agent"
GROUPS, ROLLOUTS, STEPS = 4, 4, 2


def write_config(folder: Path, ray: dict[str, Any] | None = None, **train: Any) -> Path:
    data = {
        "store_uri": f"sqlite:///{folder / 'agl.db'}",
        "agent_roles": {"gamma": 1.0, "solver": {"lora_r": 8}},
        "engine": {"max_batch": 16, "max_model_len": 96},
        "ray": {"runners": {"count": 2, "cpus": 0.1}, "trainer": {"cpus": 0.1}} | (ray or {}),
        "train": {
            "model": "tiny",
            "agent": f"{TOY}:answer_or_kill_the_actor_once",
            "tasks": f"{TOY}:tasks",
            "reward": f"{TOY}:letters",
            "group_size": ROLLOUTS,
            "groups_per_step": GROUPS,
            "steps": STEPS,
            "learning_rate": 3e-3,
            "max_tokens": 8,
            "unresponsive_s": 900,
            "output_dir": str(folder / "run"),
        }
        | train,
    }
    file = folder / "ray.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(open_store(f"sqlite:///{tmp_path / 'agl.db'}")) as store:
        yield store


def test_a_training_goes_on_when_a_runner_the_supervisor_and_the_trainer_are_killed(
    tmp_path: Path, store: Store
) -> None:
    command = [sys.executable, "-m", "agl", "train", str(write_config(tmp_path)), "--on", "ray"]
    environment = os.environ | {"AGL_TEST_FOLDER": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        killed = tmp_path / "killed"
        wait_until(lambda: killed.exists() and killed.read_text() != "" and not is_alive(int(killed.read_text())), 120)
        # The rollouts that the runner held keep the step from ending.
        os.kill(found(driver, "ray::Supervisor").pid, signal.SIGKILL)
        os.kill(found(driver, f"{sys.executable} -m agl train").ppid(), signal.SIGKILL)
        deadline = time.monotonic() + 120
        while driver.poll() is None:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            release_what_dead_runners_hold(store)
            time.sleep(0.5)
    finally:
        driver.kill()
    assert driver.returncode == 0, (tmp_path / "log").read_text()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    counts = [(line["step"], line["metrics"]["rollouts"], line["metrics"]["rollouts/failed"]) for line in lines]
    assert counts == [(step, GROUPS * ROLLOUTS, 0.0) for step in range(1, STEPS + 1)]


def release_what_dead_runners_hold(store: Store) -> None:
    """As the watchdog would after 900 s, but without counting the attempts."""
    names = [
        f"run-{step:05d}-g{group}-r{number}"
        for step in range(1, STEPS + 1)
        for group in range(GROUPS)
        for number in range(ROLLOUTS)
    ]
    for attempt in (attempt for name in names for attempt in store.query_attempts(name)):
        if attempt.state is AttemptState.RUNNING and not is_alive(int(attempt.worker_id.rpartition("-")[2])):
            store.finish_attempt(attempt.attempt_id, AttemptState.RELEASED)


def found(driver: "subprocess.Popen[bytes]", title: str) -> psutil.Process:
    """The process that `driver`, or one that it has started, has started as `title`."""
    found: list[psutil.Process] = []

    def is_there() -> bool:
        children = psutil.Process(driver.pid).children(recursive=True)
        found[:] = [child for child in children if title_of(child).startswith(title)]
        return bool(found)

    wait_until(is_there)
    return found[0]


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_a_cluster_without_a_gpu_is_named_where_one_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    file = write_config(tmp_path, ray={"trainer": {"devices": 64}})
    assert main(["train", str(file), "--on", "ray"]) == 2
    assert "ray.trainer.devices asks for 64 GPUs, and the Ray cluster has " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "train", "message"),
    [
        (("--address", "auto"), {}, "--address names a Ray cluster: add --on ray"),
        (("--on", "ray", "--from-store"), {}, "--from-store runs no agents"),
        (("--on", "ray"), {"runners": 3}, "--on ray decides train.runners: remove it"),
    ],
)
def test_what_ray_cannot_do_is_refused(
    words: tuple[str, ...], train: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(write_config(tmp_path, **train)), *words]) == 2
    assert message in capsys.readouterr().err


def plan_of(folder: Path, token: str = "", **ray: Any) -> Plan:
    data = yaml.safe_load(write_config(folder, ray).read_text())
    config = Config.parse(data)
    train = config.require_train()
    return Plan("run", data, config.ray, train.output_dir, train.concurrency, str(folder), token, ("--accept-changes",))


def test_each_process_has_its_rank_and_the_addresses_of_the_others(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "secret", trainer={"devices": 2}, runners={"count": 3, "cpus": 0.5})
    address = Address("10.0.0.7", 8400, 4318, 29500)
    jobs = [plan.trainer_job(rank, address) for rank in range(plan.processes)]
    shared = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    for rank, job in enumerate(jobs):
        # Ray shows each process one GPU, which is its first.
        own = {"RANK": str(rank), "LOCAL_RANK": "0", "AGL_TOKEN": "secret"}
        assert job.variables == shared | own
        assert job.words == ("train", "{config}", "--accept-changes")
    train = Config.parse(yaml.safe_load(jobs[0].config)).require_train()
    assert (train.runners, train.host, train.port, train.otlp_http_port) == ("external", "10.0.0.7", 8400, 4318)

    runner = plan.runner_job("run", address)
    assert runner.variables == {"AGL_TOKEN": "secret"}
    assert " ".join(runner.words) == (
        "runner {config} --store http://10.0.0.7:8400 --collector http://10.0.0.7:4318 --run run --concurrency 11"
    )
    assert "secret" not in runner.config + jobs[0].config + " ".join(runner.words)


def test_several_models_train_in_one_process(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, trainer={"devices": 2})
    with pytest.raises(ConfigError, match=r"`models` names several: set ray\.trainer\.devices to 1 or 0"):
        replace(plan, config=plan.config | {"models": {"small": {"path": "tiny"}}}).check()


@pytest.mark.parametrize(
    ("has", "message"),
    [
        ({"CPU": 64.0}, r"asks for 2 GPUs, and the Ray cluster has 0"),
        ({"CPU": 3.0, "GPU": 2.0}, r"ask for 3.5 CPUs, and the Ray cluster has 3: lower ray.runners.count"),
    ],
)
def test_what_a_cluster_lacks_is_named(has: dict[str, float], message: str, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, trainer={"devices": 2}, runners={"count": 3, "cpus": 0.5})
    with pytest.raises(ConfigError, match=message):
        plan.check_room(has)
    plan.check_room({"CPU": 3.5, "GPU": 2.0})


def test_a_command_waits_for_the_same_training_only(tmp_path: Path) -> None:
    running = plan_of(tmp_path, "one")
    _check_same(running, plan_of(tmp_path, "another"))
    with pytest.raises(ConfigError, match="already trains run with another configuration"):
        _check_same(running, plan_of(tmp_path, runners={"count": 9}))


def test_many_deaths_of_one_process_in_a_short_time_are_no_accident() -> None:
    deaths = Deaths(limit=2, within_s=60)
    assert [deaths.are_no_accident("runner-0", now) for now in (0, 30, 59, 100)] == [False, False, True, False]
    assert not deaths.are_no_accident("runner-1", 59)
