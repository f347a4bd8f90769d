"""The engine of `agl serve`: it answers with the adapters that a training published, and says as which version."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch

from agl.config import AgentRoles, Config
from agl.errors import ConfigError, TrainingError
from agl.store import Resource, Store, open_store
from agl_trainer.loop.serving import local_engine
from agl_trainer.model.adapter_files import save_adapter
from agl_trainer.model.base_model import load_model
from agl_trainer.model.lora import BASE
from agl_trainer.model.policy import Policy
from tests.trainer.scripted_sampler import serving, small_tokenizer
from tests.trainer.small_model import ROLES, plain_logits, plain_model, small_model, small_policy

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A model of a few thousand parameters in a folder, for two roles."""
    folder = tmp_path / "small"
    small_model().save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    roles = {role: role_config.model_dump() for role, role_config in ROLES.items()}
    train = {"model": str(folder), "agent": "a:b", "tasks": "a:b"}
    return Config.parse({"agent_roles": roles, "train": train, "engine": {"max_model_len": 64}})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(f"sqlite:///{tmp_path / 'agl.db'}")
    yield store
    store.close()


def publish(store: Store, folder: Path, policy: Policy, role: str, version: int) -> Path:
    """Publish the adapter of `role` as a training does; returns its folder."""
    target = folder / "adapters" / f"{role}@{version}"
    save_adapter(target, policy.adapter(role), policy.adapter_config(role))
    store.put_resource(Resource(f"default/{role}", version, str(target)))
    return target


@contextmanager
def client(config: Config, store: Store) -> Iterator[httpx.Client]:
    with (
        local_engine(config, store) as (engine,),
        serving(engine.app) as url,
        httpx.Client(base_url=f"{url}/v1") as client,
    ):
        yield client


def complete(client: httpx.Client, model: str) -> tuple[str, list[int]]:
    """The model that answered, and its greedy answer."""
    body = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 6, "return_token_ids": True}
    answer = client.post("/completions", json=body).raise_for_status().json()
    return answer["model"], answer["choices"][0]["token_ids"]


@torch.no_grad()
def plain_answer(config: Config, policy: Policy, adapter: str) -> list[int]:
    """The same by transformers and PEFT alone, up to a stop token."""
    base, tokenizer = load_model(Path(config.require_train().model))
    base.set_attn_implementation("sdpa")
    model, row = plain_model(policy, adapter, base), list(PROMPT)
    for _ in range(6):
        row.append(int(plain_logits(model, row)[-1].argmax()))
        if row[-1] == tokenizer.eos_token_id:
            break
    return row[len(PROMPT) :]


def test_the_newest_published_adapter_of_each_role_answers(config: Config, store: Store, tmp_path: Path) -> None:
    old, new = small_policy(adapter_std=0.1), small_policy(adapter_std=0.4)
    publish(store, tmp_path, new, "writer", 12)
    publish(store, tmp_path, old, "writer", 9)
    publish(store, tmp_path, old, "fixer", 3)
    store.put_resource(Resource("another run/writer", 99, "its folder"))
    with client(config, store) as asked:
        names = [model["id"] for model in asked.get("/models").json()["data"]]
        assert names == ["small", "writer", "fixer", "writer@12", "fixer@3"]
        assert complete(asked, "writer") == ("writer@12", plain_answer(config, new, "writer"))
        assert complete(asked, "writer@12") == complete(asked, "writer")
        assert complete(asked, "fixer") == ("fixer@3", plain_answer(config, old, "fixer"))
        assert complete(asked, "small") == ("small@0", plain_answer(config, new, BASE))
        assert len({tuple(complete(asked, name)[1]) for name in ("writer", "fixer", "small")}) == 3
        assert asked.post("/completions", json={"model": "writer@9", "prompt": PROMPT}).status_code == 404


def test_a_role_without_an_adapter_answers_as_the_base_model_and_that_is_said(
    config: Config, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(store, tmp_path, small_policy(), "writer", 1)
    with caplog.at_level(logging.WARNING), client(config, store) as asked:
        name, answer = complete(asked, "fixer")
        assert (name, answer) == ("fixer@0", complete(asked, "small")[1])
    assert f"role 'fixer' has no adapter of run 'default' (train.output_dir) in {store.uri} yet" in caplog.text
    assert "'writer'" not in caplog.text


def test_an_adapter_that_is_gone_is_named(config: Config, store: Store, tmp_path: Path) -> None:
    weights = publish(store, tmp_path, small_policy(), "fixer", 4) / "adapter_model.safetensors"
    weights.unlink()
    message = r"fixer@4 of run 'default' in \S+ should be in \S+adapter_model\.safetensors: no such file"
    with pytest.raises(ConfigError, match=message), local_engine(config, store):
        pass


def test_an_adapter_of_another_size_is_refused(config: Config, store: Store, tmp_path: Path) -> None:
    policy = small_policy()
    folder = tmp_path / "adapters" / "writer@1"
    save_adapter(folder, policy.adapter("fixer"), policy.adapter_config("fixer"))
    store.put_resource(Resource("default/writer", 1, str(folder)))
    with (
        pytest.raises(TrainingError, match="the saved adapter of role 'writer' does not fit"),
        local_engine(config, store),
    ):
        pass


def test_without_roles_the_base_model_answers(config: Config, store: Store) -> None:
    base_only = config.model_copy(update={"agent_roles": AgentRoles()})
    with client(config, store) as trained, client(base_only, store) as base:
        assert [model["id"] for model in base.get("/models").json()["data"]] == ["small"]
        assert complete(base, "small") == complete(trained, "small")
