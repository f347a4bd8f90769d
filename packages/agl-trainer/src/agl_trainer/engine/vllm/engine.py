"""Keeps the adapters of a training loaded on vLLM servers, and routes each role to its verified version."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from agl.config import LogprobsMode
from agl.errors import TrainingError
from agl_trainer.compute.forward import forward_rows
from agl_trainer.data.rows import TrainingRow
from agl_trainer.engine.vllm.server import VllmServer
from agl_trainer.engine.vllm.verification import CANARY, verify
from agl_trainer.model.adapter_files import save_adapter
from agl_trainer.model.lora import BASE
from agl_trainer.model.policy import Policy

logger = logging.getLogger(__name__)

_RESTART_TIMEOUT_S = 600.0
"""A server takes minutes to load a model."""


class VllmEngine:
    """vLLM servers with the same base model, as the engine of a training of `policy`.

    `make_live` writes each changed adapter to `folder`, which the servers must be able to read, loads it on every
    server as `<role>@<n>`, verifies it there, and then calls `route(role, name)`. Every version gets its own name:
    under a reused name vLLM would reuse the prefix cache, which was computed with the old weights.
    """

    def __init__(
        self,
        servers: Sequence[VllmServer],
        policy: Policy,
        folder: Path,
        *,
        tolerance: float,
        route: Callable[[str, str], None],
    ) -> None:
        self._bases = {server: _base_name(server, policy) for server in servers}
        self._policy = policy
        self._folder = folder
        self._tolerance = tolerance
        self._route = route
        self._canary: list[int] = policy.tokenizer(CANARY).input_ids
        self._live: dict[str, str] = {}
        modes = {server.logprobs_mode(base, self._canary[0]) for server, base in self._bases.items()}
        self.logprobs_mode: LogprobsMode = "processed_logprobs" if modes == {"processed_logprobs"} else "raw_logprobs"
        for server in servers:  # unload the adapters of an earlier training, whose names this one will reuse
            for model in server.models():
                if model.partition("@")[0] in policy.roles:
                    server.unload(model)

    tokens_sampled: None = None
    """The servers do not report it."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does nothing: the servers have their own copy of the weights."""
        yield

    def revive(self) -> None:
        """Wait until all servers answer, else raise TrainingError; `make_live` reloads adapters that they lost."""
        loaded = {server: server.wait(_RESTART_TIMEOUT_S) for server in self._bases}
        for role, name in list(self._live.items()):
            if all(name in names for names in loaded.values()):
                continue
            del self._live[role]
            for server, names in loaded.items():
                if name in names:
                    server.unload(name)

    def make_live(self) -> None:
        """Load the adapter of every role with a new version on the servers and route the role to it.

        Raises TrainingError if an adapter cannot be verified; its role is then still answered by the old version.
        """
        for role in self._policy.roles:
            name = self._policy.version_name(role)
            if self._live.get(role) != name:
                self._replace(role, name)

    def _replace(self, role: str, name: str) -> None:
        folder = self._folder / name
        save_adapter(folder, self._policy.adapter(role), self._policy.adapter_config(role))
        expected = self._logprobs(role), self._logprobs(BASE)
        for server in self._bases:
            self._load(server, name, folder, expected)
        self._route(role, name)
        if old := self._live.get(role):
            for server in self._bases:
                server.unload(old)
        self._live[role] = name

    def _load(self, server: VllmServer, name: str, folder: Path, expected: tuple[Tensor, Tensor]) -> None:
        server.load(name, folder)
        try:
            adapted, base = (server.prompt_logprobs(model, self._canary) for model in (name, self._bases[server]))
            verification = verify(name, (adapted, base), expected, self._tolerance)
        except TrainingError:
            server.unload(name)
            raise
        logger.info("%s is live at %s: %s", name, server.url, verification)

    def _logprobs(self, adapter: str) -> Tensor:
        """Logprobs [T - 1] of the canary's tokens, except the first."""
        row = TrainingRow(self._canary, [0] + [1] * (len(self._canary) - 1), 1.0)
        with self._policy.lock:
            return forward_rows(self._policy, adapter, [row], len(self._canary)).logprobs[row.key].float()


def _base_name(server: VllmServer, policy: Policy) -> str:
    """The server's name for the base model: the first in its list. Raises TrainingError if the list is empty."""
    models = server.models()
    if not models:
        raise TrainingError(f"vLLM at {server.url} serves no model; start it with the base model, {policy.base_name}")
    return models[0]
