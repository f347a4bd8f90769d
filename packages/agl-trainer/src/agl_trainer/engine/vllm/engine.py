"""Keeps the adapters of a training loaded on vLLM servers, and routes each role to its verified version."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from agl.config import LogprobsMode
from agl.errors import TrainingError
from agl_trainer.engine.vllm.proof import CANARY, AdapterProof, Version
from agl_trainer.engine.vllm.server import VllmServer
from agl_trainer.model.adapter_files import save_adapter
from agl_trainer.model.policy import Policy

logger = logging.getLogger(__name__)

_RESTART_TIMEOUT_S = 600.0
"""A server takes minutes to load a model."""


class VllmEngine:
    """vLLM servers with the same base model, as the engine of a training of `policy`.

    `make_live` writes each changed adapter to `folder`, which the servers must be able to read, loads it on every
    server as `<role>@<n>`, verifies it there, and then calls `route` once, with the new name of each changed role.
    Every version gets its own name: under a reused name vLLM would reuse the prefix cache, which was computed with the
    old weights. Rollouts that run stay on their versions, so an old one is unloaded after the last rollout that began
    before the switch.
    """

    def __init__(
        self,
        servers: Sequence[VllmServer],
        policy: Policy,
        folder: Path,
        *,
        tolerance: float,
        route: Callable[[Mapping[str, str]], None],
        pause: Callable[[], AbstractContextManager[None]] = nullcontext,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`pause`: context in which the policy trains. The servers have their own copy of the weights, but may share
        the memory of the accelerator. `check` raises TrainingError if a server has ended for good."""
        self.paused = pause
        self._servers: tuple[VllmServer, ...] = ()
        self._policy = policy
        self._folder = folder
        self._route = route
        self._check = check
        self._live: dict[str, Version] = {}
        """By the role that owns the adapter."""
        self._lock = threading.Lock()
        self._switches = 0
        self._running: Counter[int] = Counter()
        """Running calls of `running_rollouts`, by the number of switches before they began."""
        self._old: list[tuple[int, Version]] = []
        """Replaced versions that are still loaded, with the number of the switch that replaced them."""
        self.logprobs_mode: LogprobsMode = "processed_logprobs"
        self._proof = AdapterProof(policy, tolerance)
        for server in servers:
            self.add(server)

    tokens_sampled: None = None
    """The servers do not report it."""

    def add(self, server: VllmServer) -> None:
        """Load all versions in use on `server`, and use it too.

        Raises TrainingError if it does not answer, serves another base model, or reports other logprobs.
        """
        base = _base_name(server, self._policy)
        mode = server.logprobs_mode(base, self._first_token())
        if self._servers and mode != self.logprobs_mode:
            raise TrainingError(
                f"vLLM at {server.url} reports {mode}, and the one at {self._servers[0].url} {self.logprobs_mode}; "
                "start both with --logprobs-mode processed_logprobs"
            )
        for model in server.models():  # Adapters of an earlier training, whose names this one will reuse.
            if model.partition("@")[0] in self._policy.roles:
                server.unload(model)
        self._proof.add(server, base)
        for version in self._versions():
            self._load(server, version)
        self.logprobs_mode = mode
        self._servers = (*self._servers, server)

    def remove(self, server: VllmServer) -> None:
        """Use `server` no more."""
        self._servers = tuple(other for other in self._servers if other is not server)
        self._proof.forget(server)

    def revive(self) -> None:
        """Wait until all servers answer, and load the versions that they lost. Raises TrainingError if one does not."""
        for server in self._servers:
            loaded = server.wait(_RESTART_TIMEOUT_S, self._check)
            for version in self._versions():
                if version.name not in loaded:
                    self._load(server, version)

    def make_live(self) -> None:
        """Load each adapter with a new version on the servers, then route its roles to it, all in one step.

        Raises TrainingError if an adapter cannot be verified; the roles are then still answered by the old versions.
        """
        versions = {owner: self._version(owner) for owner in self._policy.adapters}
        changed = {
            owner: version
            for owner, version in versions.items()
            if owner not in self._live or self._live[owner].name != version.name
        }
        if not changed:
            return
        for owner, version in changed.items():
            save_adapter(version.folder, self._policy.adapter(owner), self._policy.adapter_config(owner))
            self._load_everywhere(version)
        self._route({role: changed[owner].name for owner in changed for role in self._policy.adapters[owner]})
        with self._lock:
            self._switches += 1
            self._old += [(self._switches, self._live[owner]) for owner in changed if owner in self._live]
            self._live |= changed
        self._unload_unused()

    @contextmanager
    def running_rollouts(self) -> Iterator[None]:
        with self._lock:
            begun = self._switches
            self._running[begun] += 1
        try:
            yield
        finally:
            with self._lock:
                self._running[begun] -= 1
            self._unload_unused()

    def _unload_unused(self) -> None:
        """Unload the versions that were replaced before each running rollout began."""
        with self._lock:
            oldest = min((begun for begun, count in self._running.items() if count), default=self._switches)
            unused = [version for switch, version in self._old if switch <= oldest]
            self._old = [(switch, version) for switch, version in self._old if switch > oldest]
        for version in unused:
            self._unload(version)

    def _unload(self, version: Version) -> None:
        for server in self._servers:
            try:
                server.unload(version.name)
            except TrainingError as error:  # a server that restarted has lost it
                logger.warning("%s was not unloaded: %s", version.name, error)

    def _version(self, owner: str) -> Version:
        name = self._policy.version_name(owner)
        return Version(name, owner, self._folder / name)

    def _versions(self) -> list[Version]:
        """Those in use."""
        with self._lock:
            return [*(version for _, version in self._old), *self._live.values()]

    def _load_everywhere(self, version: Version) -> None:
        for server in self._servers:
            self._load(server, version)

    def _load(self, server: VllmServer, version: Version) -> None:
        server.load(version.name, version.folder)
        try:
            found = self._proof.prove(server, version)
        except TrainingError:
            server.unload(version.name)
            raise
        logger.info("%s is live at %s: %s", version.name, server.url, found or "it changes nothing yet")

    def _first_token(self) -> int:
        """A prompt after which the model is unsure."""
        tokens: list[int] = self._policy.tokenizer(CANARY).input_ids
        return tokens[0]


def _base_name(server: VllmServer, policy: Policy) -> str:
    """The server's name for the base model: the first in its list. Raises TrainingError if the list is empty."""
    models = server.models()
    if not models:
        raise TrainingError(f"vLLM at {server.url} serves no model; start it with the base model, {policy.base_name}")
    return models[0]
