"""A resumed training applies and names what only steers it, and refuses what changes what it trains."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agl.config import Config
from agl.config.section import Section
from agl.errors import TrainingError
from agl_trainer.loop.changes import ANY, FIXED, FIXED_IN, STEERING, changes_since, phase_of
from agl_trainer.loop.checkpoint import Checkpoint
from agl_trainer.loop.state import GRPO, SFT
from agl_trainer.model.fingerprint import fingerprint
from agl_trainer.model.tiny import build_tiny_model

DATA: dict[str, Any] = {
    "rewards": {"goal": 1.0},
    "agent_roles": {"writer": {"lora_r": 4}, "fixer": {}},
    "train": {"model": "tiny", "agent": "a:b", "tasks": "a:c"},
    "sft": {"examples": "a:d"},
}
BASE = {"architecture": "1", "weights": "2", "tokenizer": "3"}


def keys_of(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = [kind for kind in types_in(field.annotation) if isinstance(kind, type) and issubclass(kind, Section)]
        key = {"agent_roles.roles": "agent_roles.<role>", "models": "models.<name>"}.get(
            f"{prefix}{name}", prefix + name
        )
        for kind in inner:
            yield from keys_of(kind, f"{key}.")
        if not inner:
            yield key


def types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for one in get_args(annotation):
        yield from types_in(one)


def changed(**sections: Any) -> list[str]:
    """What is said of a configuration in which these sections differ from `DATA`."""
    return [f"{change} {change.fixed_in}" for change in found(sections, BASE)]


def found(sections: dict[str, Any], base: dict[str, str]):
    data = {name: DATA.get(name, {}) | (value or {}) for name, value in (DATA | sections).items()}
    data |= {name: value for name, value in sections.items() if value is None}
    config = Config.parse({name: value for name, value in data.items() if value is not None})
    checkpoint = Checkpoint(3, GRPO, 0, {}, {}, {}, {}, Config.parse(DATA).to_yaml(), base=BASE)
    return changes_since(checkpoint, config, base)


def test_every_key_of_the_configuration_is_in_one_class() -> None:
    keys = list(keys_of(Config))
    assert {"agent_roles.<role>.lora_r", "train.traces.modes", "engine.kind", "judge.url"} <= set(keys)
    for key in keys:
        phase_of(key)
    classes = [FIXED, STEERING, *FIXED_IN.values()]
    listed = [key for one in classes for key in one]
    assert len(listed) == len(set(listed))
    unknown = [name for name in listed if not any(f"{key}.".startswith(f"{name}.") for key in keys)]
    assert not unknown
    with pytest.raises(KeyError):
        phase_of("train.a_new_key")


def test_changes_are_told_apart_by_what_they_do() -> None:
    assert changed() == []
    assert changed(train={"learning_rate": 1.0, "group_size": 4}) == [
        "train.group_size 8 -> 4 None",
        "train.learning_rate 0.0002 -> 1.0 None",
    ]
    assert changed(train={"eval_tasks": "a:e", "algorithm": "rejection"}) == [
        f"train.algorithm grpo -> rejection {GRPO}",
        "train.eval_tasks (not set) -> a:e None",
    ]
    assert changed(sft=None, train={"seed": 1}) == [
        f"train.seed 0 -> 1 {ANY}",
        f"sft.examples a:d -> (not set) {SFT}",
        "sft.epochs 3 -> (not set) None",
        "sft.batch_size 8 -> (not set) None",
        "sft.learning_rate 0.001 -> (not set) None",
    ]
    judge = {"url": "http://x/v1", "model": "m", "criteria": "c"}
    assert {change.fixed_in for change in found({"judge": judge, "rewards": {"goal": 1.0, "judge": 0.0}}, BASE)} == {
        None,
        ANY,
    }


def test_roles_are_compared_by_name_and_key() -> None:
    assert changed(agent_roles={"writer": {"lora_r": 4, "lora_alpha": 8}}) == [
        f"agent_roles.writer.lora_alpha 32 -> 8 {ANY}"
    ]
    assert changed(agent_roles={"judge": {}}) == [
        f"the names in agent_roles writer, fixer -> writer, fixer, judge {ANY}"
    ]
    assert changed(agent_roles={"fixer": {"adapter": "writer"}}) == [
        f"agent_roles.fixer.adapter (not set) -> writer {ANY}",
    ]


def test_another_base_is_one_change_and_another_name_of_it_steers() -> None:
    (change,) = found({"train": DATA["train"] | {"model": "/b"}}, BASE | {"weights": "9", "tokenizer": "8"})
    assert f"{change} {change.fixed_in}" == f"train.model (weights, tokenizer differ) tiny -> /b {ANY}"
    assert changed(train={"model": "/b"}) == ["train.model tiny -> /b None"]


def test_each_of_several_bases_is_compared_with_its_own() -> None:
    models = {"small": {"path": "tiny"}, "large": {"path": "/a"}}
    roles = {"writer": {"model": "large"}, "fixer": {"model": "small"}}
    before = {"models": models, "agent_roles": roles, "train": {}}
    base = {f"{name}.{part}": digest for name in models for part, digest in BASE.items()}
    checkpoint = Checkpoint(3, GRPO, 0, {}, {}, {}, {}, Config.parse(before).to_yaml(), base=base)

    def said(given: dict[str, Any], base: dict[str, str]) -> list[str]:
        return [f"{change} {change.fixed_in}" for change in changes_since(checkpoint, Config.parse(given), base)]

    assert said(before, base) == []
    other = before | {"models": models | {"large": {"path": "/b", "engine": {"max_model_len": 64}}}}
    assert said(other, base | {"large.weights": "9"})[0] == f"models.large.path (weights differ) /a -> /b {ANY}"
    assert "models.large.engine.max_model_len (not set) -> 64 None" in said(other, base)
    swapped = before | {"agent_roles": {"writer": {"model": "small"}, "fixer": {"model": "large"}}}
    assert said(swapped, base) == [
        f"agent_roles.writer.model large -> small {ANY}",
        f"agent_roles.fixer.model small -> large {ANY}",
    ]


def test_a_configuration_of_another_version_is_named() -> None:
    checkpoint = Checkpoint(3, GRPO, 0, {}, {}, {}, {}, "train: {model: tiny, mood: good}", base=BASE)
    with pytest.raises(TrainingError, match=r"another version of agl wrote the checkpoint.*train\.mood: unknown key"):
        changes_since(checkpoint, Config.parse(DATA), BASE)


def test_a_fingerprint_is_of_the_model_and_not_of_its_files(tmp_path: Path) -> None:
    """Equal in half the precision and in two shards; different by seed, by a setting and by the chat template."""
    base = tmp_path / "base"
    build_tiny_model(base, ["a few words"], 0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    expected = fingerprint(base, tokenizer)
    assert set(expected) == {"architecture", "weights", "tokenizer"}

    half = tmp_path / "half"
    model.to(torch.bfloat16).save_pretrained(half)
    model.float().save_pretrained(tmp_path / "sharded", max_shard_size="1MB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert fingerprint(tmp_path / "sharded", tokenizer) == fingerprint(half, tokenizer)
    assert differing(fingerprint(half, tokenizer), expected) == ["weights"]  # they were rounded

    build_tiny_model(tmp_path / "other", ["a few words"], 1)
    assert differing(fingerprint(tmp_path / "other", tokenizer), expected) == ["weights"]
    model.config.rms_norm_eps = 0.1
    model.save_pretrained(tmp_path / "norm")
    assert "architecture" in differing(fingerprint(tmp_path / "norm", tokenizer), expected)
    tokenizer.chat_template = "{{ messages }}"
    assert differing(fingerprint(base, tokenizer), expected) == ["tokenizer"]


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return [part for part in one if one[part] != other[part]]
