"""The adapters of a training at a vLLM server: which versions are loaded, which of them answer."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from agl.errors import TrainingError
from agl_trainer.compute.forward import forward_rows
from agl_trainer.data.rows import TrainingRow
from agl_trainer.engine.vllm.proof import CANARY, prove
from agl_trainer.engine.vllm.server import VllmServer
from agl_trainer.model.adapter_files import save_adapter
from agl_trainer.model.lora import BASE
from agl_trainer.model.policy import Policy

logger = logging.getLogger(__name__)

_BACK_WITHIN_S = 600.0
"""A server takes minutes to load a model."""


class VllmEngine:
    """vLLM servers, all with the same base model, as the engine of a training of `policy`.

    `make_live` writes an adapter that has changed to `folder`, which the servers must be able to read, has each load it
    as `<role>@<n>` and prove it, and only then calls `route` with the role and that name. Each version has a name of
    its own: in place of another it would share that one's prefix cache, whose keys and values are of other weights.
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
        for server in servers:
            _unload_all(server, policy.roles)

    tokens_sampled: None = None
    """Only the server knows."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing to do: the weights that change are not those that sample."""
        yield

    def revive(self) -> None:
        """Wait for servers that do not answer, and forget what one that was started anew does not know any more.

        Raises TrainingError for one that stays away.
        """
        known = {server: server.wait(_BACK_WITHIN_S) for server in self._bases}
        for role, name in list(self._live.items()):
            if all(name in names for names in known.values()):
                continue
            del self._live[role]
            for server, names in known.items():
                if name in names:
                    server.unload(name)

    def make_live(self) -> None:
        """Bring the adapter of every role that has a new version to the servers.

        Raises TrainingError where one cannot be proved: its role is answered by the version that it had.
        """
        for role in self._policy.roles:
            name = self._policy.version_name(role)
            if self._live.get(role) != name:
                self._replace(role, name)

    def _replace(self, role: str, name: str) -> None:
        folder = self._folder / name
        save_adapter(folder, self._policy.adapter(role), self._policy.adapter_config(role))
        trainer = self._logprobs(role), self._logprobs(BASE)
        for server in self._bases:
            self._load(server, name, folder, trainer)
        self._route(role, name)
        if before := self._live.get(role):
            for server in self._bases:
                server.unload(before)
        self._live[role] = name

    def _load(self, server: VllmServer, name: str, folder: Path, trainer: tuple[Tensor, Tensor]) -> None:
        server.load(name, folder)
        try:
            adapted, base = (server.prompt_logprobs(model, self._canary) for model in (name, self._bases[server]))
            proof = prove(name, (adapted, base), trainer, self._tolerance)
        except TrainingError:
            server.unload(name)
            raise
        logger.info("%s is live at %s: %s", name, server.url, proof)

    def _logprobs(self, adapter: str) -> Tensor:
        """[T - 1] of the canary's tokens but the first."""
        row = TrainingRow(self._canary, [0] + [1] * (len(self._canary) - 1), 1.0)
        with self._policy.lock:
            return forward_rows(self._policy, adapter, [row], len(self._canary)).logprobs[row.key].float()


def _base_name(server: VllmServer, policy: Policy) -> str:
    """What the server calls the base model: the first that it lists. Raises TrainingError where it serves none."""
    models = server.models()
    if not models:
        raise TrainingError(f"vLLM at {server.url} serves no model; start it with the base model, {policy.base_name}")
    return models[0]


def _unload_all(server: VllmServer, roles: Sequence[str]) -> None:
    """Versions of a training before this one: they may be of other weights under the same names."""
    for model in server.models():
        if model.partition("@")[0] in roles:
            server.unload(model)
