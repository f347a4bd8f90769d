"""vLLM servers for tests without vLLM: they answer from a policy of their own."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from agl.config import LogprobsMode
from agl.errors import TrainingError
from agl_trainer.engine.vllm.server import VllmServer
from agl_trainer.model.lora import BASE
from agl_trainer.model.policy import Policy


class ServedPolicy(VllmServer):
    """A server that loads adapters from folders, and loses them when it restarts."""

    def __init__(self, name: str, policy: Policy) -> None:
        super().__init__(f"http://{name}/v1")
        self.policy = policy
        self.loaded: dict[str, dict[str, torch.Tensor]] = {}
        self.failures_left = 0
        """Number of requests that still fail."""

    def models(self) -> list[str]:
        if self.failures_left:
            self.failures_left -= 1
            raise TrainingError(f"vLLM at {self.url} does not answer")
        return ["small", *self.loaded]

    def load(self, name: str, folder: Path, factor: int = 1) -> None:
        assert name not in self.loaded, "vLLM rejects a name that is already loaded"
        weights = load_file(folder / "adapter_model.safetensors")
        self.loaded[name] = {key: value * (factor if ".lora_B." in key else 1) for key, value in weights.items()}

    def unload(self, name: str) -> None:
        del self.loaded[name]

    def logprobs_mode(self, model: str, token_id: int) -> LogprobsMode:
        return "processed_logprobs"

    @torch.no_grad()
    def next_logprobs(
        self, model: str, prompts: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[dict[int, float]]:
        role = BASE
        if adapter := self.loaded.get(model):
            role = model.partition("@")[0]
            self.policy.load_adapter(role, adapter, 0)
        lengths = [len(prompt) for prompt in prompts]
        tokens = torch.nn.utils.rnn.pad_sequence([*map(torch.tensor, prompts)], batch_first=True)
        states = self.policy.padded_states(tokens.flatten(), lengths, role).view(len(prompts), max(lengths), -1)
        last = states[range(len(prompts)), [length - 1 for length in lengths]]
        values, likeliest = self.policy.logits(last).log_softmax(-1).topk(20)
        return [dict(zip(*pair, strict=True)) for pair in zip(likeliest.tolist(), values.tolist(), strict=True)]
