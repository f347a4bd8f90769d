"""Proves that vLLM serves an adapter, by the logprobs of the likeliest tokens after many short prompts."""

import heapq
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from agl.errors import TrainingError
from agl_trainer.compute.forward import forward_rows
from agl_trainer.data.rows import TrainingRow
from agl_trainer.engine.vllm.server import VllmServer
from agl_trainer.engine.vllm.verification import UNUSED, Verification, rms, smallest_change, verify
from agl_trainer.model.adapter_files import WEIGHTS, read_tensors
from agl_trainer.model.lora import BASE
from agl_trainer.model.policy import Policy

CANARY = (
    "SELECT customers.name, COUNT(orders.id) AS number FROM customers JOIN orders ON orders.customer_id = customers.id "
    "WHERE orders.total > 100 GROUP BY customers.name ORDER BY number DESC LIMIT 10; The planner reads the question, "
    "thinks about which tables answer it, writes down the steps and hands them to the executor, who says what came."
)
"""Any text works: training changes the logprobs after every text."""
_PROMPT_TOKENS, _STRIDE, _TOKENS = 4, 2, 4
"""Prompts are so many tokens of the canary, one from every second of its tokens on; so many tokens after each count."""
_MOST_PASSES, _LARGEST_GROWTH, _HEADROOM = 12, 64.0, 1.2
_B = ".lora_B."
"""In the names of the matrices that are 0 before the first update."""


@dataclass(frozen=True)
class Version:
    """An adapter of the trainer, in a PEFT folder that the servers can read."""

    name: str
    role: str
    folder: Path
    changes: dict[int, Tensor] = field(default_factory=dict)
    """What it changes in the trainer, by the factor that amplifies it."""


class AdapterProof:
    """Compares servers with the trainer. The change of a small adapter does not stand out from rounding errors.

    In bfloat16, one step at a learning rate of 1e-5 changes the logprobs of a small model by 0.0002 nats, and rounding
    by 0.07: millions of prompts would have to be averaged. So such an adapter is loaded a second time, amplified: the
    same weights with a larger `lora_alpha`, for which trainer and server have to agree.
    """

    def __init__(self, policy: Policy, tolerance: float) -> None:
        self._policy = policy
        self._tolerance = tolerance
        canary: list[int] = policy.tokenizer(CANARY).input_ids
        self.prompts = [canary[at : at + _PROMPT_TOKENS] for at in range(0, len(canary) - _PROMPT_TOKENS, _STRIDE)]
        self._tokens: list[list[int]] = []
        """Compared after each prompt: the likeliest of the first server."""
        self._served_bases: dict[VllmServer, Tensor] = {}
        self._smallest_changes: dict[VllmServer, float] = {}

    def add(self, server: VllmServer, base: str) -> None:
        """Measure how far `base`, its name for the base model, is from the trainer's.

        Raises TrainingError if it is more than the tolerance. Asked now, while no adapter of the server is in use: vLLM
        0.32 on a CPU applies an adapter to requests for the base model that it computes together with requests for
        adapters.
        """
        if is_first := not self._tokens:
            likeliest = server.next_logprobs(base, self.prompts)
            self._tokens = [heapq.nlargest(_TOKENS, found, key=found.__getitem__) for found in likeliest]
            self._base = self._trainer_logprobs(BASE)
        served = self.served(server, base)[0]
        try:
            self._smallest_changes[server] = smallest_change(server.url, served, self._base, self._tolerance)
        except TrainingError:
            if is_first:
                self._tokens = []
            raise
        self._served_bases[server] = served

    def forget(self, server: VllmServer) -> None:
        del self._served_bases[server], self._smallest_changes[server]

    def prove(self, server: VllmServer, version: Version) -> Verification | None:
        """None before the first update, when there is no change to compare.

        Raises TrainingError if `server` does not serve `version`.
        """
        if not self._change(version, 1).any():
            return None
        factor = self._factor(version, self._smallest_changes[server])
        served = self.served(server, version.name)
        if factor == 1:
            return self.compare(server, version, factor, served)
        if torch.equal(served[0], self._served_bases[server]):
            raise TrainingError(f"{version.name} is not live. {UNUSED}")
        name = f"{version.name}x{factor}"
        server.load(name, version.folder, factor)
        try:
            return self.compare(server, version, factor, self.served(server, name))
        finally:
            server.unload(name)

    def compare(self, server: VllmServer, version: Version, factor: int, served: tuple[Tensor, Tensor]) -> Verification:
        """Compare changes; a logprob below the lowest that the server reports counts as that one, on both sides."""
        logprobs, lowest = served
        expected = (self._base + self._change(version, factor)).maximum(lowest)
        return verify(version.name, logprobs - self._served_bases[server], expected - self._base, factor)

    def _factor(self, version: Version, enough: float) -> int:
        """By how much the adapter has to be amplified, so that its change is at least `enough` nats."""
        factor, change = 1, 0.0
        for _ in range(_MOST_PASSES):
            change = rms(self._change(version, factor))
            if change >= enough:
                return factor
            factor = math.ceil(
                factor * min(_HEADROOM * enough / change, _LARGEST_GROWTH) if change else _LARGEST_GROWTH
            )
        raise TrainingError(
            f"{version.name} cannot be proved live: amplified {factor} times it changes the logprobs by {change:.2g} "
            f"nats, and {enough:.2g} would stand out from the rounding errors of engine and trainer"
        )

    def served(self, server: VllmServer, model: str) -> tuple[Tensor, Tensor]:
        """Logprobs [P, K] of the compared tokens, at least the lowest [P, 1] that the server reports of each prompt."""
        found = server.next_logprobs(model, self.prompts)
        lowest = torch.tensor([[min(of.values())] for of in found])
        tokens = zip(found, self._tokens, lowest, strict=True)
        return torch.tensor(
            [[of.get(token, float(least)) for token in compared] for of, compared, least in tokens]
        ), lowest

    def _change(self, version: Version, factor: int) -> Tensor:
        """Change [P, K] of the trainer's logprobs by the adapter in the version's folder, amplified."""
        if factor not in version.changes:
            weights = read_tensors(version.folder / WEIGHTS)
            amplified = {name: value * (factor if _B in name else 1) for name, value in weights.items()}
            with self._policy.lock, self._policy.replaced_adapter(version.role, amplified):
                version.changes[factor] = self._trainer_logprobs(version.role) - self._base
        return version.changes[factor]

    def _trainer_logprobs(self, adapter: str) -> Tensor:
        """Logprobs [P, K] of the compared tokens."""
        rows = [
            TrainingRow([*prompt, token], [0] * len(prompt) + [1], 1.0)
            for prompt, tokens in zip(self.prompts, self._tokens, strict=True)
            for token in tokens
        ]
        with self._policy.lock:
            found = forward_rows(self._policy, adapter, rows, len(rows) * (_PROMPT_TOKENS + 1)).logprobs
        return torch.cat([found[row.key] for row in rows]).float().view(len(self.prompts), _TOKENS)
