"""Adapters at a real vLLM server: pushed, proved, and live only then."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from agl.config import RoleConfig
from agl.errors import TrainingError
from agl_trainer.engine.vllm.engine import VllmEngine
from agl_trainer.engine.vllm.server import VllmServer
from agl_trainer.model.adapter_files import save_adapter
from agl_trainer.model.base_model import load_model, model_folder
from agl_trainer.model.policy import Policy
from tests.vllm.conftest import BASE

pytestmark = pytest.mark.timeout(2400)  # the first test waits until vLLM is installed and has started

TOLERANCE = 1e-3
"""In nats a token; both compute in float32, and 5e-6 is what is seen."""


@pytest.fixture(scope="module")
def policy() -> Policy:
    model, tokenizer = load_model(model_folder(BASE))
    roles = {"writer": RoleConfig(), "fixer": RoleConfig(lora_r=8)}
    return Policy(model, tokenizer, roles, base_name=BASE, seed=0)


@pytest.fixture
def server(vllm_url: str) -> Iterator[VllmServer]:
    with VllmServer(vllm_url) as server:
        yield server


def update(policy: Policy, role: str, size: float) -> str:
    """Change every weight by `size`, as one step of Adam does; the name of the new version."""
    with torch.no_grad():
        for parameter in policy.parameters(role):
            parameter.add_(torch.randn_like(parameter).sign() * size)
    policy.versions[role] += 1
    return policy.version_name(role)


def test_a_version_is_live_once_it_is_proved_and_the_one_before_is_unloaded(
    server: VllmServer, policy: Policy, tmp_path: Path
) -> None:
    live: dict[str, str] = {}
    engine = VllmEngine([server], policy, tmp_path, tolerance=TOLERANCE, route=live.__setitem__)
    engine.make_live()
    assert sorted(server.models()) == sorted([BASE, *live.values()])
    assert live == {role: policy.version_name(role) for role in policy.roles}

    name = update(policy, "writer", 3e-4)
    engine.make_live()
    assert live["writer"] == name
    assert sorted(server.models()) == sorted([BASE, *live.values()])


def test_what_answers_as_the_base_model_is_found_out_and_never_live(
    vllm_url: str, policy: Policy, tmp_path: Path
) -> None:
    """A training whose requests reach the base model is the silent failure that users of other tools report."""
    untrained = tmp_path / "untrained"
    weights = {name: torch.zeros_like(tensor) for name, tensor in policy.adapter("writer").items()}
    save_adapter(untrained, weights, policy.adapter_config("writer"))

    class Mistaken(VllmServer):
        def load(self, name: str, folder: Path) -> None:
            super().load(name, untrained if name.startswith("writer") else folder)

    live: dict[str, str] = {}
    name = update(policy, "writer", 3e-4)
    with Mistaken(vllm_url) as server:
        engine = VllmEngine([server], policy, tmp_path, tolerance=TOLERANCE, route=live.__setitem__)
        with pytest.raises(TrainingError, match=rf"{name} is not live.* 0% .*answers as the base model"):
            engine.make_live()
        assert "writer" not in live
        assert name not in server.models()


def test_another_version_than_the_trainers_is_found_out(vllm_url: str, policy: Policy, tmp_path: Path) -> None:
    stale = tmp_path / "stale"
    update(policy, "writer", 1e-3)
    save_adapter(stale, policy.adapter("writer"), policy.adapter_config("writer"))

    class Stale(VllmServer):
        def load(self, name: str, folder: Path) -> None:
            super().load(name, stale if name.startswith("writer") else folder)

    update(policy, "writer", 1e-2)
    with Stale(vllm_url) as server:
        engine = VllmEngine([server], policy, tmp_path, tolerance=TOLERANCE, route=lambda role, name: None)
        with pytest.raises(TrainingError, match="is not live"):
            engine.make_live()


def test_versions_of_a_training_before_this_one_are_not_taken_for_its_own(
    server: VllmServer, policy: Policy, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    save_adapter(old, policy.adapter("writer"), policy.adapter_config("writer"))
    names = {model for model in server.models() if model != BASE}
    if "writer@77" not in names:
        server.load("writer@77", old)
    VllmEngine([server], policy, tmp_path, tolerance=TOLERANCE, route=lambda role, name: None)
    assert server.models() == [BASE]


def test_a_server_that_is_not_there_is_named() -> None:
    with VllmServer("http://127.0.0.1:9/v1") as server, pytest.raises(TrainingError, match=r"127\.0\.0\.1:9.*start it"):
        server.models()
