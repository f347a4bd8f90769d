"""`agl train` of the SQL example with vLLM as its engine: two steps, adapters pushed after each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agl.store import open_store
from agl.trajectory import build_trajectory
from agl_trainer.vllm.server import VllmServer

pytestmark = pytest.mark.timeout(2400)  # vLLM is slow on a CPU that others use too

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
  reward: tests.vllm.test_training:brevity
  instrument: [agl_langchain]
  group_size: {group_size}
  groups_per_step: {groups}
  steps: {steps}
  learning_rate: 3.0e-4
  concurrency: 8
  timeout_s: 600
  output_dir: {folder}/run
"""


def brevity(task: object, answer: object) -> float:
    """A reward that hardly two of the base model's answers share: so each step has something to learn from."""
    return 1 / (1 + len(str(answer)))


@pytest.fixture(scope="module")
def trained(vllm_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the training."""
    folder = tmp_path_factory.mktemp("training")
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(folder=folder, url=vllm_url, group_size=GROUP_SIZE, groups=GROUPS, steps=STEPS))
    command = [Path(sys.executable).with_name("agl"), "train", str(config)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_both_roles_are_trained_in_both_steps(trained: Path) -> None:
    lines = [json.loads(line)["metrics"] for line in (trained / "run/metrics.jsonl").read_text().splitlines()]
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


def test_the_last_versions_are_live_when_the_training_is_over(trained: Path, vllm_url: str) -> None:
    published = {path.name for path in (trained / "run/adapters").iterdir()}
    with VllmServer(vllm_url) as server:
        loaded = {model for model in server.models() if "@" in model}
    assert loaded == {f"writer@{STEPS}", f"fixer@{STEPS}"}
    assert loaded <= published
