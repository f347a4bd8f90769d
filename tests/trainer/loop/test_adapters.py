"""`agl adapters`: what is listed, exported and merged is what the policy computes with, by PEFT's and our own word."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from agl.cli import main
from agl.config import Config, RoleConfig
from agl_trainer.compute.logprobs import row_logprobs
from agl_trainer.data.rows import TrainingRow
from agl_trainer.loop.checkpoint import Checkpoint, save_checkpoint
from agl_trainer.model.adapter_files import save_adapter
from agl_trainer.model.policy import Policy
from agl_trainer.model.tiny import build_tiny_model

ROLES: Mapping[str, RoleConfig] = {"writer": RoleConfig(lora_r=4), "fixer": RoleConfig(lora_r=2, lora_alpha=4)}
IDS = [5, 9, 3, 11, 7]


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    """With adapters that change what the model says: `writer@2`, `fixer@0` published, `writer@3` in a checkpoint."""
    base = tmp_path / "base"
    build_tiny_model(base, ["a few words to learn from"], 0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    policy = Policy(model, AutoTokenizer.from_pretrained(base), ROLES, base_name="base", seed=0)
    for role in ROLES:
        for parameter in policy.parameters(role):
            torch.nn.init.normal_(parameter, std=0.1)
    for name in ("writer@2", "fixer@0"):
        role = name.partition("@")[0]
        save_adapter(tmp_path / "run" / "adapters" / name, policy.adapter(role), policy.adapter_config(role))
    cut_short = tmp_path / "run" / "adapters" / "writer@4" / "adapter_model.safetensors"
    cut_short.parent.mkdir()
    cut_short.write_bytes(b"half of it")
    config = Config.parse(
        {
            "agent_roles": {role: {"lora_r": config.lora_r} for role, config in ROLES.items()},
            "train": {"model": str(base), "agent": "a:b", "tasks": "a:b", "output_dir": str(tmp_path / "run")},
        }
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    return policy


def checkpoint(policy: Policy, folder: Path) -> None:
    """A checkpoint in which `writer` is one version further, and all zero."""
    adapters = {role: policy.adapter(role) for role in policy.roles}
    adapters["writer"] = {name: torch.zeros_like(tensor) for name, tensor in adapters["writer"].items()}
    configs = {role: policy.adapter_config(role) for role in policy.roles}
    save_checkpoint(folder, Checkpoint(7, "grpo", 0, {"writer": 3, "fixer": 0}, adapters, configs, {}, ""))


def logprobs(policy: Policy, role: str) -> torch.Tensor:
    row = TrainingRow(IDS, [0] + [1] * (len(IDS) - 1), 1.0)
    with torch.no_grad():
        return row_logprobs(policy, role, [row]).logprobs[0]


def plain_logprobs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([IDS])).logits[0].log_softmax(-1)
    return logits[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]


def adapters(tmp_path: Path, verb: str, *rest: str) -> int:
    return main(["adapters", verb, str(tmp_path / "config.yaml"), *rest])


def test_every_version_is_listed_once(policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(policy, tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints" / "step-000009").mkdir()  # half of a copy
    (tmp_path / "run" / "checkpoints" / "step-notes.txt").write_text("not a checkpoint")
    assert adapters(tmp_path, "list") == 0
    head, *lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head == ["adapter", "rank", "alpha", "parameters", "kept", "in"]
    assert [(line[0], line[1], line[2], line[4]) for line in lines] == [
        ("fixer@0", "2", "4", "adapters"),
        ("writer@2", "4", "32", "adapters"),
        ("writer@3", "4", "32", "step-000007"),
    ]
    assert adapters(tmp_path, "list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["parameters"] for one in listed[:2]] == [
        sum(parameter.numel() for parameter in policy.parameters(role)) for role in ("fixer", "writer")
    ]


def test_an_export_is_what_peft_loads(policy: Policy, tmp_path: Path) -> None:
    target = tmp_path / "out" / "fixer"
    assert adapters(tmp_path, "export", "fixer", "--to", str(target)) == 0
    assert sorted(path.name for path in target.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    base = json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(model, str(target)).eval()
    assert torch.allclose(plain_logprobs(loaded), logprobs(policy, "fixer"), atol=1e-5)


def test_a_merge_is_a_model_without_an_adapter(policy: Policy, tmp_path: Path) -> None:
    target = tmp_path / "merged"
    assert adapters(tmp_path, "merge", "writer@2", "--to", str(target)) == 0
    merged = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    assert torch.allclose(plain_logprobs(merged), logprobs(policy, "writer"), atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    assert not torch.allclose(plain_logprobs(merged), plain_logprobs(base), atol=1e-3)
    assert AutoTokenizer.from_pretrained(target).encode("a few") == policy.tokenizer.encode("a few")


def test_without_a_version_it_is_what_is_served_else_the_newest(policy: Policy, tmp_path: Path) -> None:
    checkpoint(policy, tmp_path / "run" / "checkpoints")
    published = tmp_path / "run" / "adapters" / "writer@2"
    kept = tmp_path / "run" / "checkpoints" / "step-000007" / "adapters" / "writer"
    for name, expected in (("served", published), ("newest", kept)):
        assert adapters(tmp_path, "export", "writer", "--to", str(tmp_path / name)) == 0
        weights = "adapter_model.safetensors"
        assert (tmp_path / name / weights).read_bytes() == (expected / weights).read_bytes()
        shutil.rmtree(published, ignore_errors=True)


def test_what_cannot_be_written_is_refused(policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapters(tmp_path, "export", "judge", "--to", str(tmp_path / "x")) == 2
    assert "no adapter 'judge'; there are fixer@0, writer@2" in capsys.readouterr().err
    assert adapters(tmp_path, "export", "fixer", "--to", str(tmp_path / "base")) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err
    weights = tmp_path / "run" / "adapters" / "writer@2" / "adapter_model.safetensors"
    torch.save(policy.adapter("writer"), weights)  # pickled, under the right name
    for verb in ("export", "merge"):
        assert adapters(tmp_path, verb, "writer", "--to", str(tmp_path / "y")) == 2
        assert "has no adapter in safetensors" in capsys.readouterr().err
    assert not (tmp_path / "y").exists() and not list(tmp_path.glob(".y-*"))
