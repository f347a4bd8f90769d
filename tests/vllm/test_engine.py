"""Adapters on a real vLLM server: loaded, verified, and only then live."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch

from agl.config import RoleConfig
from agl.errors import TrainingError
from agl.store import open_store
from agl_trainer.engine.vllm.engine import VllmEngine
from agl_trainer.engine.vllm.fleet import Fleet
from agl_trainer.engine.vllm.keeper import EngineKeeper
from agl_trainer.engine.vllm.registry import Wanted
from agl_trainer.engine.vllm.remote import RemoteEngine
from agl_trainer.engine.vllm.server import VllmServer
from agl_trainer.model.adapter_files import save_adapter
from agl_trainer.model.base_model import load_model
from agl_trainer.model.model_folder import model_folder
from agl_trainer.model.policy import Policy
from tests.vllm.conftest import BASE
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(2400)  # the first test waits until vLLM is installed and has started

TOLERANCE = 1e-3
"""In nats per token. Both compute in float32; the observed distance is 5e-6."""
TINY_STEP = 1e-5
"""Changes the logprobs by 0.00015 nats, which stands out from that."""


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
    """Change every weight by `size`, as one step of Adam does; returns the name of the new version."""
    with torch.no_grad():
        for parameter in policy.parameters(role):
            parameter.add_(torch.randn_like(parameter).sign() * size)
    policy.versions[role] += 1
    return policy.version_name(role)


def test_a_verified_version_becomes_live_and_the_old_one_is_unloaded(
    server: VllmServer, policy: Policy, tmp_path: Path
) -> None:
    live: dict[str, str] = {}
    engine = VllmEngine([server], policy, tmp_path, tolerance=TOLERANCE, route=live.update)
    engine.make_live()
    assert sorted(server.models()) == sorted([BASE, *live.values()])
    assert live == {role: policy.version_name(role) for role in policy.roles}

    name = update(policy, "writer", TINY_STEP)
    engine.make_live()
    assert live["writer"] == name
    assert sorted(server.models()) == sorted([BASE, *live.values()])


def test_an_adapter_that_the_server_does_not_use_never_becomes_live(
    vllm_url: str, policy: Policy, tmp_path: Path
) -> None:
    """Users of other tools report this silent failure: all requests of a training reach the base model."""
    untrained = tmp_path / "untrained"
    weights = {name: torch.zeros_like(tensor) for name, tensor in policy.adapter("writer").items()}
    save_adapter(untrained, weights, policy.adapter_config("writer"))

    class WithoutAdapter(VllmServer):
        def load(self, name: str, folder: Path, factor: int = 1) -> None:
            super().load(name, untrained if name.startswith("writer") else folder, factor)

    live: dict[str, str] = {}
    name = update(policy, "writer", TINY_STEP)
    with WithoutAdapter(vllm_url) as server:
        engine = VllmEngine([server], policy, tmp_path, tolerance=TOLERANCE, route=live.update)
        with pytest.raises(TrainingError, match=rf"{name} is not live.* 0% .*answers as the base model"):
            engine.make_live()
        assert "writer" not in live
        assert name not in server.models()


def test_a_version_that_differs_from_the_trainers_is_detected(vllm_url: str, policy: Policy, tmp_path: Path) -> None:
    stale = tmp_path / "stale"
    update(policy, "writer", 1e-3)
    save_adapter(stale, policy.adapter("writer"), policy.adapter_config("writer"))

    class Stale(VllmServer):
        def load(self, name: str, folder: Path, factor: int = 1) -> None:
            super().load(name, stale if name.startswith("writer") else folder, factor)

    update(policy, "writer", 1e-2)
    with Stale(vllm_url) as server:
        engine = VllmEngine([server], policy, tmp_path, tolerance=TOLERANCE, route=lambda names: None)
        with pytest.raises(TrainingError, match="is not live"):
            engine.make_live()


def test_adapters_of_an_earlier_training_are_unloaded(server: VllmServer, policy: Policy, tmp_path: Path) -> None:
    old = tmp_path / "old"
    save_adapter(old, policy.adapter("writer"), policy.adapter_config("writer"))
    names = {model for model in server.models() if model != BASE}
    if "writer@77" not in names:
        server.load("writer@77", old)
    VllmEngine([server], policy, tmp_path, tolerance=TOLERANCE, route=lambda names: None)
    assert server.models() == [BASE]


def test_an_engine_that_registers_is_given_what_is_in_use_and_gives_it_back(
    server: VllmServer, policy: Policy, tmp_path: Path
) -> None:
    """The step is so small that it is proved with an amplified copy, which is made beside the engine."""
    live: dict[str, str] = {}
    used: list[str] = []
    wanted = Wanted(base={}, roles=tuple(policy.roles))
    with closing(open_store(f"sqlite:///{tmp_path / 'agl.db'}")) as store, ExitStack() as stack:
        there = tmp_path / "there"
        keeper = EngineKeeper(store, "run", server, server.url, there, lease_s=600, patience_s=600)
        fleet = Fleet(store, "run", wanted, lease_s=600, headers={}, on_use=used.append, on_drop=used.remove)
        stack.enter_context(fleet)
        work = threading.Thread(target=keeper.work, args=(60.0,))
        work.start()
        stack.callback(work.join)
        stack.callback(keeper.stop)
        here, show = tmp_path / "here", lambda waits: None
        engine = RemoteEngine(fleet, policy, here, tolerance=TOLERANCE, route=live.update, on_wait=show)
        engine.make_live()
        name = update(policy, "writer", TINY_STEP / 100)
        engine.make_live()
        assert live["writer"] == name and used == [server.url]
        wait_until(lambda: sorted(server.models()) == sorted([BASE, *live.values()]), 600)
        assert len([*there.iterdir()]) == 2
    assert server.models() == [BASE] and not there.exists() and used == []


def test_the_error_names_a_server_that_does_not_answer() -> None:
    with VllmServer("http://127.0.0.1:9/v1") as server, pytest.raises(TrainingError, match=r"127\.0\.0\.1:9.*start it"):
        server.models()
