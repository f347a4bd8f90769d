"""vLLM servers of other machines as the engine of a training: they may come and go, as long as one is left."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from agl.errors import TrainingError
from agl_trainer.engine.vllm.engine import VllmEngine
from agl_trainer.engine.vllm.fleet import Fleet
from agl_trainer.engine.vllm.proof import Version
from agl_trainer.engine.vllm.server import EngineGoneError
from agl_trainer.model.policy import Policy

_WAIT_S: Final = 3600.0
"""Longest wait for the first engine: a machine has to start, and its vLLM to load the model."""
_POLL_S: Final = 0.5


class RemoteEngine(VllmEngine):
    """The engines of `fleet`. A new one is used from the next change of versions on, once all versions are proved.

    An engine that fails is not used any more, and the others go on. Raises TrainingError if none is left, or none has
    come for an hour.
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        folder: Path,
        *,
        tolerance: float,
        route: Callable[[Mapping[str, str]], None],
        on_wait: Callable[[bool], None],
    ) -> None:
        """`on_wait` is called with True before it waits for an engine, and with False when one has come."""
        self._fleet = fleet
        self._on_wait = on_wait
        super().__init__([], policy, folder, tolerance=tolerance, route=route)
        self._take_in()

    def make_live(self) -> None:
        self._take_in()
        super().make_live()

    def revive(self) -> None:
        self._take_in()

    def _take_in(self) -> None:
        """Use the engines that have come, and forget those that have gone; waits if there is none."""
        deadline, waits = time.monotonic() + _WAIT_S, False
        while not self._update():
            if not waits:
                self._on_wait(waits := True)
            if time.monotonic() > deadline:
                raise TrainingError(f"no engine has registered for {_WAIT_S:g} s: start `agl engine` on a machine")
            time.sleep(_POLL_S)
        if waits:
            self._on_wait(False)

    def _update(self) -> bool:
        """Whether there is an engine now."""
        for server in self._fleet.arrivals():
            try:
                self.add(server)
            except TrainingError as error:
                self._fleet.refuse(server, str(error))
            else:
                self._fleet.use(server)
        return self._forget_gone()

    def _forget_gone(self) -> bool:
        """Whether engines are left."""
        in_use = self._fleet.in_use()
        for server in self._servers:
            if server not in in_use:
                self.remove(server)
        return bool(self._servers)

    def _load_everywhere(self, version: Version) -> None:
        """Raises TrainingError if the version is to blame: no engine that answers can load or prove it."""
        while True:
            failure: TrainingError | None = None
            for server in self._fleet.in_use():
                try:
                    self._load(server, version)
                except EngineGoneError:
                    self._fleet.drop([server])
                except TrainingError as error:
                    failure = error
                    self._fleet.refuse(server, str(error))
            if self._forget_gone():
                return
            if failure is not None:
                raise failure
            self._take_in()

    def _unload(self, version: Version) -> None:
        self._fleet.unwant(version.name)
