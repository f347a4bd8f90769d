"""Adapters on servers that stop and restart. Tests with real vLLM are in tests/vllm."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from agl.config import RoleConfig, TrainConfig
from agl.errors import ConfigError, TrainingError
from agl_trainer.engine.vllm import server as server_module
from agl_trainer.engine.vllm.engine import VllmEngine
from agl_trainer.engine.vllm.server import VllmServer
from agl_trainer.loop.recorded_logprobs import recorded_logprobs_mode
from agl_trainer.model.policy import Policy
from agl_trainer.rollout.engines import Engines
from tests.trainer.engine.served_policy import ServedPolicy
from tests.trainer.scripted_sampler import small_tokenizer
from tests.trainer.small_model import small_model, small_policy


def served(name: str, **options: Any) -> ServedPolicy:
    return ServedPolicy(name, small_policy(packs=False, **options))


def engine_of(policy: Policy, servers: list[ServedPolicy], folder: Path) -> tuple[VllmEngine, list[tuple[str, str]]]:
    routed: list[tuple[str, str]] = []

    def route(names: Mapping[str, str]) -> None:
        routed.extend(names.items())

    return VllmEngine(servers, policy, folder, tolerance=0.05, route=route), routed


def train(policy: Policy, role: str, size: float) -> None:
    """Change every weight by `size`, as one step of Adam does."""
    with torch.no_grad():
        for parameter in policy.parameters(role):
            parameter += torch.randn_like(parameter).sign() * size
    policy.versions[role] += 1


def test_engines_of_several_base_models_go_live_and_pause_together(tmp_path: Path) -> None:
    """The gateway, which all share, is closed before the first server sleeps, and opens when the last one is awake."""
    seen: list[str] = []

    @contextmanager
    def noted(name: str) -> Iterator[None]:
        seen.append(name)
        yield
        seen.append(f"{name} again")

    policies, engines = {}, []
    for role in ("writer", "fixer"):
        roles = {role: RoleConfig(lora_r=4)}
        policies[role], server = small_policy(roles=roles), served(role, roles=roles)
        pause = functools.partial(noted, role)
        options: dict[str, Any] = {"tolerance": 0.05, "route": lambda names: seen.extend(names.values())}
        engines.append(VllmEngine([server], policies[role], tmp_path, pause=pause, **options))
    together = Engines(engines, functools.partial(noted, "gateway"))
    assert (together.tokens_sampled, together.logprobs_mode) == (None, "processed_logprobs")
    with together.paused():
        for role, policy in policies.items():
            train(policy, role, 0.1)
    together.make_live()
    around = ["gateway", "writer", "fixer", "fixer again", "writer again", "gateway again"]
    assert seen == [*around, "writer@1", "fixer@1"]


def test_an_old_version_stays_until_the_last_rollout_that_may_use_it_has_ended(tmp_path: Path) -> None:
    roles = {"writer": RoleConfig(lora_r=4)}
    policy, server = small_policy(roles=roles), served("one", roles=roles)
    engine, routed = engine_of(policy, [server], tmp_path)

    def push() -> list[str]:
        train(policy, "writer", 0.1)
        engine.make_live()
        return [*server.loaded]

    engine.make_live()
    assert push() == ["writer@1"]  # no rollout ran
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(engine.running_rollouts())
        assert push() == ["writer@1", "writer@2"]
        second.enter_context(engine.running_rollouts())
        assert push() == ["writer@1", "writer@2", "writer@3"]
        first.close()
        assert [*server.loaded] == ["writer@2", "writer@3"]
        server.loaded.clear()  # the server restarted
        engine.revive()
        assert sorted(server.loaded) == ["writer@2", "writer@3"]
        server.unload = refuse  # type: ignore[method-assign]  # as a server that has restarted again
        second.close()
    assert routed == [("writer", f"writer@{version}") for version in range(4)]


def refuse(name: str) -> None:
    raise TrainingError(f"{name} is not loaded")


def test_roles_that_share_an_adapter_push_it_once(tmp_path: Path) -> None:
    roles = {"writer": RoleConfig(lora_r=4), "fixer": RoleConfig(adapter="writer"), "judge": RoleConfig(lora_r=2)}
    server = served("one", roles=roles)
    engine, routed = engine_of(small_policy(roles=roles), [server], tmp_path)
    engine.make_live()
    assert [*server.loaded] == ["writer@0", "judge@0"]
    assert routed == [("writer", "writer@0"), ("fixer", "writer@0"), ("judge", "judge@0")]


def test_a_restarted_server_gets_its_adapters_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_POLL_INTERVAL_S", 0.0)
    policy, servers = small_policy(), [served("one"), served("two")]
    engine, routed = engine_of(policy, servers, tmp_path)
    engine.make_live()
    names = ["writer@0", "fixer@0"]
    assert [[*server.loaded] for server in servers] == [names, names]
    train(policy, "writer", 0.1)  # the servers get the weights that were live, not these
    servers[1].loaded, servers[1].failures_left = {}, 3
    engine.revive()
    assert [[*server.loaded] for server in servers] == [names, names]
    for name in names:
        assert all(map(torch.equal, *(server.loaded[name].values() for server in servers)))
    policy.versions["writer"] -= 1
    engine.make_live()
    assert len(routed) == 2  # nothing has changed for the gateway


class Missing(ServedPolicy):
    """Loads adapters, and answers as the base model."""

    def load(self, name: str, folder: Path, factor: int = 1) -> None:
        super().load(name, folder)
        self.loaded[name] = {key: 0 * value for key, value in self.loaded[name].items()}


class Stale(ServedPolicy):
    """Serves the weights of version 1 as version 2, with the `lora_alpha` that it is told."""

    def load(self, name: str, folder: Path, factor: int = 1) -> None:
        super().load(name, folder.with_name("writer@1") if "@2" in name else folder, factor)


@pytest.mark.parametrize("size", [1e-5, 2e-4, 1e-2])
@pytest.mark.parametrize("kind", [ServedPolicy, Missing, Stale])
def test_steps_of_any_size_are_proved_in_bfloat16(tmp_path: Path, size: float, kind: type[ServedPolicy]) -> None:
    """Trainer and engine round differently: packed rows and rows with padding."""
    roles = {"writer": RoleConfig(lora_r=4, lora_alpha=8)}
    torch.manual_seed(1)
    policies = [
        Policy(small_model(dtype=torch.bfloat16), small_tokenizer(), roles, base_name="small", seed=0, packs=packs)
        for packs in (True, False)
    ]
    policy, server = policies[0], kind("one", policies[1])
    engine, _ = engine_of(policy, [server], tmp_path)
    engine.make_live()
    for version in (1, 2):
        train(policy, "writer", size)
        if kind is ServedPolicy or (kind is Stale and version == 1):
            engine.make_live()
        else:
            with pytest.raises(TrainingError, match=f"writer@{version} is not live"):
                engine.make_live()
            assert f"writer@{version}" not in server.loaded


def test_a_server_that_does_not_come_back_ends_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_POLL_INTERVAL_S", 0.0)
    server = served("one")
    server.failures_left = 10**9
    with pytest.raises(TrainingError, match="does not answer"):
        server.wait(0.01)
    server.failures_left = 0
    found: Any = server.wait(0.01)
    assert found == ["small"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"detail":"Not Found"}', "has no /load_lora_adapter: start vLLM with --enable-lora"),
        ('{"error":{"message":"Not Found","type":"Not Found","code":404}}', "has no /load_lora_adapter: start vLLM"),
        (
            '{"error":{"message":"No adapter found for /x","type":"NotFoundError","code":404}}',
            "rejected load_lora_adapter: 404 .*No adapter found for /x",
        ),
    ],
)
def test_a_folder_that_a_server_cannot_read_is_not_taken_for_a_missing_option(body: str, expected: str) -> None:
    """vLLM answers 404 for both. The bodies are those of vLLM 0.32."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

    with HTTPServer(("127.0.0.1", 0), Handler) as http, VllmServer(f"http://127.0.0.1:{http.server_port}/v1") as server:
        Thread(target=http.handle_request).start()
        with pytest.raises(TrainingError, match=expected):
            server.load("writer@1", Path("x"))


@pytest.mark.parametrize(
    ("cold", "hot", "expected"),
    [(-0.5, -2.5, "processed_logprobs"), (-0.5, -0.505, "raw_logprobs"), (-0.01, -0.4, "processed_logprobs")],
)
def test_a_server_whose_logprobs_change_with_the_temperature_has_processed_ones(
    cold: float, hot: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {1.0: cold, 2.0: hot}
    monkeypatch.setattr(VllmServer, "next_logprobs", lambda *asked: [{3: answers[asked[-1]], 4: -9.0}])
    assert VllmServer("http://one/v1").logprobs_mode("small", 3) == expected
    answers[1.0] = 17.5
    with pytest.raises(TrainingError, match=r"reports logits.*--logprobs-mode processed_logprobs"):
        VllmServer("http://one/v1").logprobs_mode("small", 3)


def test_losses_that_need_logprobs_of_what_was_sampled_refuse_raw_ones(tmp_path: Path) -> None:
    engine, _ = engine_of(small_policy(), [served("one")], tmp_path)

    def mode(**train: Any) -> str:
        return recorded_logprobs_mode(TrainConfig.model_validate({"model": "tiny"} | train), engine)

    needs = {"importance_sampling_mode": "token_truncate", "temperature": 0.7}
    assert mode(**needs) == "processed_logprobs"
    with pytest.raises(ConfigError, match="is raw_logprobs, but the engine records processed_logprobs"):
        mode(logprobs_mode="raw_logprobs")
    engine.logprobs_mode = "raw_logprobs"
    assert mode(temperature=0.7) == mode(importance_sampling_mode="token_truncate") == "raw_logprobs"
    with pytest.raises(ConfigError, match=r"train.importance_sampling_mode needs .* with temperature 0.7.*start vLLM"):
        mode(**needs)
    with pytest.raises(ConfigError, match=r"train.asynchronous needs .* with temperature 0.7"):
        mode(asynchronous=True, max_staleness=1, temperature=0.7)
    with pytest.raises(ConfigError, match=r"train.off_policy_mask_threshold needs .* with top_p 0.9"):
        mode(off_policy_mask_threshold=0.1, sampling={"top_p": 0.9})
