"""`agl train` of the SQL example with vLLM as its engine, which runs already or is launched."""

import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from agl.store import open_store
from agl.store.states import RolloutState
from agl.trajectory import Call, build_trajectory
from agl_trainer.engine.vllm.server import VllmServer
from tests.vllm.environment import vllm_program
from tests.vllm.serving import ENVIRONMENT

pytestmark = pytest.mark.timeout(2400)  # vLLM is slow on a busy CPU

ROOT = Path(__file__).parents[2]
STEPS, GROUPS, GROUP_SIZE = 2, 2, 4
CONFIG = """\
store_uri: sqlite:///{folder}/agl.db
agent_roles: {{writer: {{lora_r: 16}}, fixer: {fixer}}}
{engine}
train:
  model: smollm2
  agent: examples.sql_agent.agent:run
  tasks: examples.sql_agent.tasks:train_tasks
  reward: tests.vllm.test_training:chance
  instrument: [agl_langchain]
  group_size: {group_size}
  groups_per_step: {groups}
  steps: {steps}
  learning_rate: 3.0e-4
  concurrency: 8
  timeout_s: 600
  output_dir: {folder}/run
"""


def chance(task: object, answer: object) -> float:
    """A different reward for every rollout, whatever the base model answers, so that each step has advantages."""
    return random.random()


@pytest.fixture(scope="module")
def trained(vllm_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the training."""
    folder = tmp_path_factory.mktemp("training")
    train(folder, running(vllm_url))
    return folder


def train(
    folder: Path, engine: str, options: str = "", *, steps: int = STEPS, fixer: str = "{lora_r: 16}"
) -> subprocess.CompletedProcess[str]:
    """Train in `folder`; for the other arguments see write_config."""
    config = write_config(folder, engine, options, steps=steps, fixer=fixer)
    command = [Path(sys.executable).with_name("agl"), "train", str(config)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def write_config(
    folder: Path, engine: str, options: str = "", *, steps: int = STEPS, fixer: str = "{lora_r: 16}"
) -> Path:
    """A configuration in `folder`; `engine` are lines of it, `options` such of its section `train`."""
    config = folder / "config.yaml"
    text = CONFIG.format(folder=folder, engine=engine, group_size=GROUP_SIZE, groups=GROUPS, steps=steps, fixer=fixer)
    config.write_text(text + options)
    return config


def running(vllm_url: str) -> str:
    return f'engine: vllm\ngateway: {{upstream: "{vllm_url}"}}'


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line)["metrics"] for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def live(vllm_url: str) -> set[str]:
    with VllmServer(vllm_url) as server:
        return {model for model in server.models() if "@" in model}


def test_each_step_trains(trained: Path) -> None:
    lines = metrics_of(trained)
    assert len(lines) == STEPS
    for metrics in lines:
        assert metrics["calls/trained"] > 0
        assert metrics["writer/grad_norm"] > 0


def test_every_call_was_sampled_by_the_version_of_its_step_with_its_token_ids(trained: Path) -> None:
    check_calls(trained, STEPS)


def check_calls(folder: Path, steps: int) -> int:
    """The number of calls of the rollouts that ended well, each answered by its step's adapters, with its token ids.

    A step that was interrupted has rollouts of an earlier try too.
    """
    store, calls = open_store(f"sqlite:///{folder}/agl.db"), list[tuple[int, Call]]()
    rollouts = store.get_rollouts(store.rollout_ids())
    ended = [name for name, rollout in rollouts.items() if rollout.state is RolloutState.SUCCEEDED]
    for name in ended:
        calls += ((int(name.split("-")[1]), call) for call in build_trajectory(store.query_spans(name)).calls)
    store.close()
    assert len(ended) >= steps * GROUPS * GROUP_SIZE
    assert {step for step, _ in calls} == set(range(1, steps + 1))
    for step, call in calls:
        assert call.policy_version == f"{call.role}@{step - 1}"
        assert call.prompt_ids and call.response_ids
        assert len(call.logprobs or ()) == len(call.response_ids)
    return len(calls)


def test_the_last_versions_are_live_after_the_training_and_only_they_are_published(
    trained: Path, vllm_url: str
) -> None:
    published = {path.name for path in (trained / "run/adapters").iterdir()}
    assert live(vllm_url) == published == {f"writer@{STEPS}", f"fixer@{STEPS}"}


@pytest.mark.parametrize(("staleness", "fixer"), [(2, "{lora_r: 16}"), (3, "{adapter: writer}")])
def test_rollouts_in_flight_keep_their_version_while_the_training_pushes_others(
    tmp_path: Path, vllm_url: str, staleness: int, fixer: str
) -> None:
    """None fails, no call is answered by a version other than that of its rollout, and old versions are unloaded.

    Roles that share an adapter push it once.
    """
    steps = staleness + 3
    options = f"  asynchronous: true\n  max_staleness: {staleness}\n"
    train(tmp_path, running(vllm_url), options, steps=steps, fixer=fixer)
    lines = metrics_of(tmp_path)
    assert max(metrics["writer/staleness_max"] for metrics in lines) >= 2
    for metrics in lines:
        assert metrics["calls/trained"] > 0
        assert metrics["rollouts/failed"] == 0
    store, versions = open_store(f"sqlite:///{tmp_path}/agl.db"), set[str]()
    for group, number in itertools.product(range(steps * GROUPS), range(GROUP_SIZE)):
        calls = build_trajectory(store.query_spans(f"run-g{group:06d}-r{number}")).calls
        assert not any(call.error for call in calls)
        roles, of_rollout = zip(*((call.policy_version or "").split("@") for call in calls), strict=True)
        assert list(roles) == [call.role for call in calls] and len(set(of_rollout)) == 1
        versions |= set(of_rollout)
    store.close()
    assert len(versions) >= 3
    owners = ["writer"] if "adapter" in fixer else ["writer", "fixer"]
    assert live(vllm_url) == {f"{owner}@{steps}" for owner in owners}


def test_a_training_launches_vllm_and_ends_it(tmp_path: Path) -> None:
    launch = {"program": str(vllm_program()), "dtype": "float32", "environment": ENVIRONMENT}
    engine = json.dumps({"kind": "vllm", "max_model_len": 1024, "launch": launch})
    done = train(tmp_path, f"engine: {engine}", steps=1)
    assert "waiting for vLLM to load the model" in done.stderr
    (metrics,) = metrics_of(tmp_path)
    assert metrics["calls/trained"] > 0 and metrics["rollouts/failed"] == 0
    log = (tmp_path / "run/vllm.log").read_text()
    url = re.search(r"http://127\.0\.0\.1:\d+", log)
    assert url, log[-3000:]
    with pytest.raises(httpx.ConnectError):
        httpx.get(url[0])
