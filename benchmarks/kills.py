"""A training, or a Cassandra cluster with its server, under SIGKILLs at random moments, and what is left afterwards.

    python -m benchmarks.kills train 30
    python -m benchmarks.kills vllm 10
    python -m benchmarks.kills cassandra 30

`train`: a deterministic training with the in-process engine is started again after each kill, and its adapters, its
last checkpoint and its metrics are compared with those of an undisturbed one. `vllm`: the same with real vLLM, which
runs on and does not answer the same twice, so each step, its calls and the adapters left in vLLM are looked at.
`cassandra`: senders load three nodes
with 50,000 spans, while the server, a node, or two nodes at once are killed; each acknowledged span is looked for.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from agl_trainer.model.model_folder import model_folder
from tests.flows.test_training import config_in, metrics_of
from tests.load import SPANS, Load, check
from tests.store.cassandra_server import CassandraServer, running_cassandra
from tests.store.serving import serving
from tests.vllm.serving import serve_vllm
from tests.vllm.test_training import check_calls, live, running, write_config

AGL = Path(sys.executable).with_name("agl")
STEPS = 45


def kill_training(kills: int, seed: int = 0) -> str:
    """Raises AssertionError if anything that is left differs from an undisturbed training."""
    moments, root = random.Random(seed), Path(tempfile.mkdtemp(prefix="agl-kills-"))
    whole, killed = root / "whole", root / "killed"
    begin = time.monotonic()
    undisturbed = _start(whole)
    first = whole / "run/checkpoints/step-000001"
    while not first.exists():
        assert undisturbed.poll() is None, (whole / "output").read_text()[-2000:]
        time.sleep(0.01)
    first_s = time.monotonic() - begin
    assert undisturbed.wait() == 0
    step_s = (time.monotonic() - begin - first_s) / (STEPS - 1)
    steps_done: list[int] = []
    for number in range(kills):
        process = _start(killed)
        time.sleep(moments.uniform(0, first_s + 4 * step_s))
        _kill(process, number)
        steps_done.append(_last_step(killed))
    last = _start(killed)
    assert last.wait() == 0, (killed / "output").read_text()[-2000:]
    files = _compare(whole, killed)
    return f"{kills} kills in {STEPS} steps; {files} files of weights are equal; steps at the kills: {steps_done}"


def _start(folder: Path) -> "subprocess.Popen[bytes]":
    """`agl train` in `folder`, in a process group of its own."""
    if not (folder / "config.yaml").exists():
        folder.mkdir()
        dropout = {"lora_r": 8, "lora_dropout": 0.1}
        config = config_in(folder, steps=STEPS, deterministic=True, eval_every=10, learning_rate=2e-4, lora=dropout)
        (folder / "config.yaml").write_text(config.to_yaml())
    with (folder / "output").open("ab") as output:
        command = [AGL, "train", str(folder / "config.yaml")]
        return subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)


def _compare(whole: Path, killed: Path) -> int:
    """The number of files of weights, each of which is the same in both folders."""
    patterns = ("adapters/**/*.safetensors", "checkpoints/**/*.safetensors", "eval/*.json")
    files = [path.relative_to(whole) for pattern in patterns for path in sorted(whole.glob(f"run/{pattern}"))]
    assert len(files) > len(patterns)
    for file in files:
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
    one, other = (
        [{k: v for k, v in step.items() if not k.startswith("time/") and not k.endswith("_per_s")} for step in steps]
        for steps in (metrics_of(whole), metrics_of(killed))
    )
    assert json.dumps(one) == json.dumps(other) and len(one) == STEPS
    return len(files)


def kill_training_on_vllm(kills: int, seed: int = 0) -> str:
    """Raises AssertionError if a step is missing or there twice, or a call was answered by another step's adapters."""
    moments, folder, steps = random.Random(seed), Path(tempfile.mkdtemp(prefix="agl-kills-")), 2 * kills
    with serve_vllm(model_folder("smollm2"), "smollm2", folder / "vllm.log") as url:
        write_config(folder, running(url), steps=steps)
        steps_done: list[int] = []
        for number in range(kills):
            goal = _last_step(folder) + moments.choice([0, 1])
            process = _start(folder)
            while _last_step(folder) < goal:
                assert process.poll() is None, (folder / "output").read_text()[-2000:]
                time.sleep(0.1)
            time.sleep(moments.uniform(0, 45))
            _kill(process, number)
            steps_done.append(_last_step(folder))
        last = _start(folder)
        assert last.wait() == 0, (folder / "output").read_text()[-2000:]
        assert live(url) == {f"writer@{steps}", f"fixer@{steps}"}
    assert len(metrics_of(folder)) == steps
    calls = check_calls(folder, steps)
    return f"{kills} kills in {steps} steps; {calls} calls, all by their step's adapters; at the kills: {steps_done}"


def _kill(process: "subprocess.Popen[bytes]", number: int) -> None:
    ended = f"the training ended after {number} kills with {process.poll()}; use more steps"
    assert process.poll() is None, ended
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_step(folder: Path) -> int:
    return max((int(path.name[5:]) for path in folder.glob("run/checkpoints/step-??????")), default=0)


def kill_cassandra(kills: int, seed: int = 0) -> str:
    """Raises AssertionError if an acknowledged span is lost or there twice."""
    moments = random.Random(seed)
    with running_cassandra(3) as cluster, ExitStack() as stack:
        uri, killed = cluster.new_keyspace(), list[str]()
        load = stack.enter_context(Load())
        process, load.url = stack.enter_context(serving(uri))
        for number in range(kills):
            load.reach(SPANS * (number + 1) // (kills + 2))
            time.sleep(moments.uniform(0, 0.2))
            victims = moments.choice(["server", *cluster.hosts, moments.sample(cluster.hosts, 2)])
            killed.append(str(victims))
            if victims == "server":
                process.kill()
                process, load.url = stack.enter_context(serving(uri))
            else:
                _kill_nodes(cluster, [victims] if isinstance(victims, str) else victims)
        load.reach(SPANS)
        check(load, uri)
        counts = f"{SPANS} spans acknowledged and found once, requests by status {dict(load.answers)}"
        return f"{kills} kills, {counts}; {killed}"


def _kill_nodes(cluster: CassandraServer, hosts: list[str]) -> None:
    for host in hosts:
        cluster.kill(host)
    for host in hosts:
        cluster.start(host)
    cluster.wait_until_up()


if __name__ == "__main__":
    print(
        {"train": kill_training, "vllm": kill_training_on_vllm, "cassandra": kill_cassandra}[sys.argv[1]](
            int(sys.argv[2])
        )
    )
