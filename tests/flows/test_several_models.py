"""One run trains the roles of two base models of different families from the same rollouts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from agl.cli import main
from agl.config import Config
from agl.errors import ConfigError
from agl.inspection.token_text import tokenizer_in
from agl.server_thread import ServerThread
from agl.store import open_store
from agl.trajectory import build_trajectory
from agl_trainer import Trainer
from agl_trainer.loop.checkpoint import load_checkpoint
from agl_trainer.loop.serving import local_engine
from agl_trainer.model.tiny import build_tiny_model
from tests.flows.toy_agent import WORDS

TOY = "tests.flows.toy_agent"
HIDDEN = {"planner": 64, "executor": 192}
STEPS = 3


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`small`, a Llama, and `other`, a Qwen2 with another tokenizer, both random."""
    folder = tmp_path_factory.mktemp("bases")
    build_tiny_model(folder / "small", WORDS, 0)
    build_tiny_model(folder / "other", ["some more words", *(f"{word} plan" for word in WORDS)], 1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "other")
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 3,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    model = Qwen2ForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.15)
    model.save_pretrained(folder / "other")
    return {name: str(folder / name) for name in ("small", "other")}


def config_in(folder: Path, bases: dict[str, str], **train: Any) -> Config:
    short = {"engine": {"max_model_len": 96}}
    data = {
        "store_uri": f"sqlite:///{folder / 'agl.db'}",
        "models": {"small": {"path": bases["small"]}, "other": {"path": bases["other"], **short}},
        "engine": {"max_model_len": 128},
        "agent_roles": {"planner": {"model": "other", "lora_r": 8}, "executor": {"model": "small", "lora_r": 4}},
        "train": {
            "agent": f"{TOY}:answer_of_two",
            "tasks": f"{TOY}:tasks",
            "eval_tasks": f"{TOY}:few_tasks",
            "reward": f"{TOY}:letters",
            "group_size": 4,
            "groups_per_step": 2,
            "steps": STEPS,
            "learning_rate": 5e-3,
            "max_tokens": 8,
            "beta": 0.01,
            "deterministic": True,
            "output_dir": str(folder / "run"),
        }
        | train,
        "sft": {"examples": f"{TOY}:examples_of_two", "epochs": 1, "batch_size": 3, "learning_rate": 3e-3},
    }
    return Config.parse(data)


def run(config: Config) -> None:
    trainer = Trainer(config)
    with trainer.open():
        trainer.sft()
        trainer.grpo()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, str]) -> Path:
    """The folder of a run of both models, undisturbed."""
    folder = tmp_path_factory.mktemp("trained")
    config = config_in(folder, bases)
    (folder / "config.yaml").write_text(config.to_yaml())
    run(config)
    return folder


def adapters_in(folder: Path, step: int) -> dict[str, dict[str, torch.Tensor]]:
    checkpoint = load_checkpoint(folder / "run" / "checkpoints" / f"step-{step:06d}")
    return {role: dict(tensors) for role, tensors in checkpoint.adapters.items()}


LAST = 2 + STEPS
"""Steps of the run: two supervised ones, one for each role, and those of GRPO."""


def test_each_role_learns_on_its_own_base_from_the_same_rollouts(trained: Path, bases: dict[str, str]) -> None:
    """Prompts and answers are in the tokens of the role's own model, and so are the texts on the page."""
    store = open_store(f"sqlite:///{trained / 'agl.db'}")
    sizes = {"planner": len(AutoTokenizer.from_pretrained(bases["other"]))}
    sizes["executor"] = len(AutoTokenizer.from_pretrained(bases["small"]))
    assert sizes["planner"] != sizes["executor"]
    rollout = build_trajectory(store.query_spans("run-00001-g0-r0"))
    assert [call.role for call in rollout.calls] == ["planner", "executor"]
    for call in rollout.calls:
        assert call.prompt_ids and max(call.prompt_ids) < sizes[call.role or ""]
        tokenizer, fault = tokenizer_in(str(trained / "run"), call.role)
        assert fault is None and tokenizer.get_vocab_size() == sizes[call.role or ""]
        assert "Say " in tokenizer.decode(call.prompt_ids)
        assert call.policy_version is not None and call.policy_version.partition("@")[0] == call.role
    for role, before in adapters_in(trained, LAST - 1).items():
        after = adapters_in(trained, LAST)[role]
        inputs = {tensor.shape[1] for name, tensor in after.items() if "q_proj.lora_A" in name}
        assert inputs == {HIDDEN[role]}
        assert any(not torch.equal(tensor, before[name]) for name, tensor in after.items())
        resource = store.get_resource(f"run/{role}")
        assert resource is not None and resource.version == STEPS + 1
    metrics = store.query_metrics("run")
    assert {name for name in metrics if name.endswith("/loss")} == {
        *("sft/planner/loss", "sft/executor/loss", "planner/loss", "executor/loss")
    }
    store.close()


def test_adapters_are_merged_and_served_on_the_base_of_their_role(
    trained: Path, bases: dict[str, str], tmp_path: Path
) -> None:
    """The server's greedy tokens are those of transformers with the merged model."""
    store = open_store(f"sqlite:///{trained / 'agl.db'}")
    config = Config.load(trained / "config.yaml")
    kinds = {"planner": "qwen2", "executor": "llama"}
    with (
        local_engine(config, store) as engines,
        ServerThread(store, port=0, otlp_http_port=0, upstream=engines) as server,
    ):
        listed = {model["id"] for model in httpx.get(f"{server.base_url}/v1/models").json()["data"]}
        versions = {f"{role}@{STEPS + 1}" for role in kinds}
        assert listed == {"small", "other", *kinds, *versions}
        for role, kind in kinds.items():
            merged = tmp_path / role
            assert main(["adapters", "merge", str(trained / "config.yaml"), role, "--to", str(merged)]) == 0
            model = AutoModelForCausalLM.from_pretrained(merged).eval()
            assert model.config.model_type == kind
            name = f"{role}@{STEPS + 1}"
            body = {"model": name, "prompt": [5, 6, 7], "temperature": 0, "max_tokens": 6, "return_token_ids": True}
            answer = httpx.post(f"{server.base_url}/v1/completions", json=body).raise_for_status().json()
            prompt = torch.tensor([[5, 6, 7]])
            greedy = model.generate(prompt, max_new_tokens=6, do_sample=False, attention_mask=prompt * 0 + 1)
            assert answer["choices"][0]["token_ids"] == greedy[0, 3:].tolist()
        refused = httpx.post(f"{server.base_url}/v1/completions", json={"model": "gpt-4o", "prompt": [5]})
        assert refused.status_code == 404 and "gpt-4o" in refused.text
    store.close()


def test_rollouts_of_the_store_train_all_models_in_one_process(
    trained: Path, bases: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = {"output_dir": str(trained / "again"), "steps": 1, "groups_per_step": 6, "traces": {"modes": ["train"]}}
    trainer = Trainer(config_in(trained, bases, **again))
    trainer.fit(from_store=True)
    (metrics,) = [
        json.loads(line)["metrics"] for line in (trained / "again" / "metrics.jsonl").read_text().splitlines()
    ]
    assert metrics["calls/trained"] > 0
    assert {path.name for path in (trained / "again" / "adapters").iterdir()} == {"planner@1", "executor@1"}
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", str(trained / "config.yaml")]) == 2


def test_an_accelerator_that_is_not_there_is_refused(bases: dict[str, str], tmp_path: Path) -> None:
    data = config_in(tmp_path, bases).model_dump(mode="json", exclude_none=True)
    data["models"]["other"]["device"] = torch.accelerator.device_count()
    with (
        pytest.raises(ConfigError, match=r"models\.other\.device is \d+, and this machine has"),
        Trainer(Config.parse(data)).open(samples=False),
    ):
        raise AssertionError


DIE_BETWEEN_THE_MODELS = """
import os, signal, sys
from agl.config import Config
from agl.errors import ConfigError
from agl_trainer.loop import grpo
from tests.flows.test_several_models import run

sound, calls = grpo.train_batch, []

def train_batch(*arguments):
    calls.append(0)
    if len(calls) == 4:  # The first model has taken the second step, the other has not.
        os.kill(os.getpid(), signal.SIGKILL)
    return sound(*arguments)

grpo.train_batch = train_batch
run(Config.load(sys.argv[1]))
"""


def content(file: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """Tensors and texts, which safetensors writes in any order."""
    with safe_open(file, framework="np") as opened:
        return {name: opened.get_tensor(name).tobytes() for name in opened.keys()}, opened.metadata()  # noqa: SIM118


def test_a_run_killed_between_the_steps_of_two_models_ends_as_one_that_was_not(
    trained: Path, bases: dict[str, str], tmp_path: Path
) -> None:
    config = config_in(tmp_path, bases)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-c", DIE_BETWEEN_THE_MODELS, str(tmp_path / "config.yaml")]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "run" / "checkpoints" / f"step-{LAST - 1:06d}").exists()
    run(config)
    files = sorted((trained / "run" / "checkpoints" / f"step-{LAST:06d}").rglob("*.safetensors"))
    files += sorted((trained / "run" / "adapters").rglob("*.safetensors"))
    assert len(files) == 2 + 2 + 1 + 4  # Adapters, references and optimizers; what SFT and GRPO publish.
    for file in files:
        assert content(tmp_path / "run" / file.relative_to(trained / "run")) == content(file), file
