"""Adapters on servers that stop and restart. Tests with real vLLM are in tests/vllm."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from agl.config import LogprobsMode, TrainConfig
from agl.errors import ConfigError, TrainingError
from agl_trainer.compute.logprobs import row_logprobs
from agl_trainer.data.rows import TrainingRow
from agl_trainer.engine.vllm import server as server_module
from agl_trainer.engine.vllm.engine import VllmEngine
from agl_trainer.engine.vllm.server import VllmServer
from agl_trainer.loop.recorded_logprobs import recorded_logprobs_mode
from agl_trainer.model.lora import BASE
from agl_trainer.model.policy import Policy
from tests.trainer.small_model import small_policy


class ServedPolicy(VllmServer):
    """A server with its own policy that loads adapters from folders and loses them when it restarts."""

    def __init__(self, name: str) -> None:
        super().__init__(f"http://{name}/v1")
        self.policy = small_policy()
        self.loaded: list[str] = []
        self.failures_left = 0
        """Number of requests that still fail."""

    def models(self) -> list[str]:
        if self.failures_left:
            self.failures_left -= 1
            raise TrainingError(f"vLLM at {self.url} does not answer")
        return ["small", *self.loaded]

    def load(self, name: str, folder: Path) -> None:
        assert name not in self.loaded, "vLLM rejects a name that is already loaded"
        self.policy.load_adapter(name.partition("@")[0], load_file(folder / "adapter_model.safetensors"), 0)
        self.loaded.append(name)

    def unload(self, name: str) -> None:
        self.loaded.remove(name)

    def logprobs_mode(self, model: str, token_id: int) -> LogprobsMode:
        return "processed_logprobs"

    def prompt_logprobs(self, model: str, token_ids: Sequence[int]) -> torch.Tensor:
        row = TrainingRow(token_ids, [0] + [1] * (len(token_ids) - 1), 1.0)
        with torch.no_grad():
            return row_logprobs(self.policy, BASE if model == "small" else model.partition("@")[0], [row]).logprobs[0]


def engine_of(policy: Policy, servers: list[ServedPolicy], folder: Path) -> tuple[VllmEngine, list[tuple[str, str]]]:
    routed: list[tuple[str, str]] = []

    def route(role: str, name: str) -> None:
        routed.append((role, name))

    return VllmEngine(servers, policy, folder, tolerance=0.05, route=route), routed


def test_a_restarted_server_gets_its_adapters_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_POLL_INTERVAL_S", 0.0)
    policy, servers = small_policy(), [ServedPolicy("one"), ServedPolicy("two")]
    engine, routed = engine_of(policy, servers, tmp_path)
    engine.make_live()
    names = ["writer@0", "fixer@0"]
    assert [server.loaded for server in servers] == [names, names]
    engine.revive()
    engine.make_live()
    assert len(routed) == 2  # no server had restarted, so nothing is loaded again
    servers[1].loaded, servers[1].failures_left = [], 3
    engine.revive()
    assert servers[0].loaded == []
    engine.make_live()
    assert [server.loaded for server in servers] == [names, names]
    assert routed == [("writer", "writer@0"), ("fixer", "fixer@0")] * 2


def test_a_server_that_does_not_come_back_ends_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_POLL_INTERVAL_S", 0.0)
    server = ServedPolicy("one")
    server.failures_left = 10**9
    with pytest.raises(TrainingError, match="does not answer"):
        server.wait(0.01)
    server.failures_left = 0
    found: Any = server.wait(0.01)
    assert found == ["small"]


@pytest.mark.parametrize(
    ("cold", "hot", "expected"),
    [(-0.5, -2.5, "processed_logprobs"), (-0.5, -0.505, "raw_logprobs"), (-0.01, -0.4, "processed_logprobs")],
)
def test_a_server_whose_logprobs_change_with_the_temperature_has_processed_ones(
    cold: float, hot: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {1.0: cold, 2.0: hot}
    monkeypatch.setattr(VllmServer, "_highest_logprob", lambda *asked: answers[asked[-1]])
    assert VllmServer("http://one/v1").logprobs_mode("small", 3) == expected
    answers[1.0] = 17.5
    with pytest.raises(TrainingError, match=r"reports logits.*--logprobs-mode processed_logprobs"):
        VllmServer("http://one/v1").logprobs_mode("small", 3)


def test_losses_that_need_logprobs_of_what_was_sampled_refuse_raw_ones(tmp_path: Path) -> None:
    engine, _ = engine_of(small_policy(), [ServedPolicy("one")], tmp_path)

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
