"""`agl train` of the SQL example with vLLM as its engine: two steps, with new adapters loaded after each."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from agl.store import open_store
from agl.trajectory import build_trajectory
from agl_trainer.engine.vllm.server import VllmServer

pytestmark = pytest.mark.timeout(2400)  # vLLM is slow on a busy CPU

ROOT = Path(__file__).parents[2]
STEPS, GROUPS, GROUP_SIZE = 2, 2, 4
CONFIG = """\
store_uri: sqlite:///{folder}/agl.db
agent_roles: {{writer: {{lora_r: 16}}, fixer: {{lora_r: 16}}}}
engine: vllm
gateway: {{upstream: "{url}"}}
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
    return train(tmp_path_factory.mktemp("training"), vllm_url)


def train(folder: Path, vllm_url: str, options: str = "") -> Path:
    config = folder / "config.yaml"
    text = CONFIG.format(folder=folder, url=vllm_url, group_size=GROUP_SIZE, groups=GROUPS, steps=STEPS)
    config.write_text(text + options)
    command = [Path(sys.executable).with_name("agl"), "train", str(config)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


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
    store = open_store(f"sqlite:///{trained}/agl.db")
    for step in range(1, STEPS + 1):
        for group in range(GROUPS):
            trajectory = build_trajectory(store.query_spans(f"run-{step:05d}-g{group}-r0"))
            assert trajectory.calls
            for call in trajectory.calls:
                assert call.policy_version == f"{call.role}@{step - 1}"
                assert call.prompt_ids and call.response_ids
                assert len(call.logprobs or ()) == len(call.response_ids)
    store.close()


def test_the_last_versions_are_live_after_the_training(trained: Path, vllm_url: str) -> None:
    published = {path.name for path in (trained / "run/adapters").iterdir()}
    assert live(vllm_url) == {f"writer@{STEPS}", f"fixer@{STEPS}"}
    assert live(vllm_url) <= published


def test_asynchronous_rollouts_run_while_a_step_trains(tmp_path: Path, vllm_url: str) -> None:
    folder = train(tmp_path, vllm_url, "  asynchronous: true\n  max_staleness: 1\n")
    lines = metrics_of(folder)
    assert [metrics["writer/staleness_max"] for metrics in lines] == [0, 1]
    for metrics in lines:
        assert metrics["calls/trained"] > 0
        assert metrics["rollouts/failed"] == 0
    assert "writer@2" in live(vllm_url)
