"""Beside an engine: loads what a training wants into the vLLM server here, and registers it for the training."""

import logging
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Set
from contextlib import suppress
from pathlib import Path
from typing import Final

from agl.errors import AglError, DamageError, FolderError, RefusedError, StoreError, TrainingError
from agl.store import Resource, Store
from agl.store.background import repeating
from agl.store.files import content_digest, fetch
from agl_trainer.engine.vllm.registry import Registration, Wanted, WantedVersion, engine_name, get_wanted
from agl_trainer.engine.vllm.server import EngineGoneError, VllmServer

logger = logging.getLogger(__name__)

_LOOK_S: Final = 0.5
_RENEWALS_PER_LEASE: Final = 4
_FETCHED: Final = re.compile(r"\.?([0-9a-f]{64})(-.*)?")
"""Names of folders with adapters: their digests, and what begins with one."""


class Patience:
    """How long to go on without what is needed."""

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._since = time.monotonic()

    def renew(self) -> None:
        self._since = time.monotonic()

    def is_spent(self) -> bool:
        return time.monotonic() - self._since > self._longest_s

    def spend(self, missing: str) -> None:
        """Raises TrainingError if it is `missing` for too long."""
        if self.is_spent():
            raise TrainingError(f"{missing}, for {self._longest_s:g} s (--patience)")


def await_training(store: Store, run: str, patience: Patience) -> Wanted:
    """What the training `run` wants, once it has begun. Raises TrainingError after `patience`."""
    while True:
        try:
            wanted = get_wanted(store, run)
        except RefusedError:
            raise
        except StoreError as error:
            patience.spend(f"the store {store.uri} does not answer: {error}")
            wanted = None
        if wanted is not None and not wanted.is_over:
            return wanted
        patience.spend(f"no training with engine.kind: remote uses the run {run!r} of {store.uri}")
        time.sleep(_LOOK_S)


class EngineKeeper:
    """Keeps the vLLM server `server` as the training `run` wants it, which reaches it at `url`.

    Adapters are fetched into `folder`, and deleted there when they are not wanted any more.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        server: VllmServer,
        url: str,
        folder: Path,
        *,
        lease_s: float,
        patience_s: float,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`check` raises TrainingError if the server has ended for good."""
        self._store = store
        self._run = run
        self._server = server
        self._url = url
        self._name = engine_name(run, url)
        self._folder = folder
        self._lease_s = lease_s
        self._patience = Patience(patience_s)
        self._check = check
        self._holder = ""
        self._number: int | None = None
        """Version of its registration; None: it is not registered."""
        self._loaded: dict[str, str] = {}
        """Name and digest of what it has loaded."""
        self._failed: dict[tuple[str, str], str] = {}
        """By name and digest why it cannot be loaded."""
        self._reported: Registration | None = None
        self._stop = threading.Event()
        self._hurry = threading.Event()

    def stop(self) -> None:
        """Have `work` return when running calls have ended; a second call: at once."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def work(self, drain_s: float) -> None:
        """Work until `stop`, or until the training has ended; then wait up to `drain_s` seconds for running calls.

        Raises TrainingError if the training refuses the engine, the server has ended, or store or server are away for
        longer than the patience.
        """
        self._delete_fetched()
        every_s = self._lease_s / _RENEWALS_PER_LEASE
        try:
            with repeating("agl-lease", {"the lease is not renewed": self._renew}, every_s, logger):
                while not self._stop.wait(_LOOK_S):
                    self._turn()
                self._drain(drain_s)
        finally:
            with suppress(StoreError):
                self._unregister()
            self._delete_fetched()
            with suppress(OSError):  # It has other files.
                self._folder.rmdir()

    def _turn(self) -> None:
        self._check()
        try:
            wanted = get_wanted(self._store, self._run)
            if wanted is None or wanted.is_over:
                self._unregister()
                if self._patience.is_spent():
                    logger.info("the training %s has ended, and was not resumed", self._run)
                    self._stop.set()
                return
            refusal = wanted.refused.get(self._url)
            if refusal is not None and refusal.holder == self._holder:
                raise TrainingError(f"the training does not use this engine: {refusal.reason}")
            if self._is_registered() and self._reconcile(wanted):
                self._report(wanted)
            self._patience.renew()
        except EngineGoneError as error:
            self._loaded.clear()
            self._unregister()
            self._patience.spend(str(error))
        except RefusedError:
            raise
        except StoreError as error:
            self._patience.spend(f"the store {self._store.uri} does not answer: {error}")

    def _is_registered(self) -> bool:
        """Register, if it is not; whether the training has noticed that an earlier registration has ended.

        Before that, it might send calls to adapters that are loaded again, and not proved again.
        """
        if self._number is None:
            last, self._holder = self._store.get_resource(self._name), secrets.token_hex(8)
            state = Registration(url=self._url, holder=self._holder)
            stored = self._store.add_resource(self._resource(last.version + 1 if last else 0, state))
            if Registration.of(stored).holder != self._holder:
                return False
            self._number, self._reported = stored.version, state
            self._renew()
        return self._number is not None and self._store.get_resource(self._name, self._number - 1) is None

    def _reconcile(self, wanted: Wanted) -> bool:
        """Load what is wanted, and unload the rest of the roles' adapters: also those of earlier trainings.

        False if the server has restarted: then it registers as another one.
        """
        listed, versions = set(self._server.models()), wanted.for_engine(self._url)
        if lost := self._loaded.keys() - listed:
            logger.warning("vLLM has lost %s: it has restarted", ", ".join(sorted(lost)))
            self._unregister()
            self._loaded.clear()
            return False
        for name in [name for name in listed if name.partition("@")[0] in wanted.roles]:
            if name not in versions or versions[name].digest != self._loaded.get(name):
                self._server.unload(name)
                self._loaded.pop(name, None)
                logger.info("unloaded %s", name)
        used = {version.digest for version in versions.values()}
        self._delete_fetched(used)
        for name, version in versions.items():
            if name not in self._loaded and (name, version.digest) not in self._failed:
                self._load(name, version)
        return True

    def _delete_fetched(self, used: Set[str] = frozenset()) -> None:
        """Delete the adapters that are not `used`, and parts of them: nothing else that may be in the folder."""
        for folder in self._folder.glob("*"):
            name = _FETCHED.fullmatch(folder.name)
            if name and name[1] not in used:
                shutil.rmtree(folder, ignore_errors=True)

    def _load(self, name: str, version: WantedVersion) -> None:
        try:
            resource = self._store.get_resource(version.resource)
            if resource is None or content_digest(resource) != version.digest:
                return  # The training wants something else by now.
            folder = self._folder / version.digest
            if not folder.exists():
                fetch(self._store, resource, folder)
            self._server.load(name, folder, version.factor)
        except EngineGoneError:
            raise
        except (DamageError, FolderError, TrainingError) as error:  # Others may pass.
            logger.error("%s was not loaded: %s", name, error)
            self._failed[name, version.digest] = str(error)
        else:
            self._loaded[name] = version.digest
            logger.info("loaded %s", name)

    def _report(self, wanted: Wanted) -> None:
        """Write what is loaded, if that has changed."""
        failed = {
            name: self._failed[name, version.digest]
            for name, version in wanted.for_engine(self._url).items()
            if (name, version.digest) in self._failed
        }
        state = Registration(url=self._url, holder=self._holder, loaded=dict(self._loaded), failed=failed)
        if self._number is not None and state != self._reported:
            self._store.put_resource(self._resource(self._number, state))
            self._reported = state

    def _resource(self, number: int, state: Registration) -> Resource:
        return Resource(self._name, number, self._url, state.metadata())

    def _renew(self) -> None:
        number = self._number
        if number is not None and self._store.lease_resource(self._name, self._holder, self._lease_s, number) is None:
            # The training did not hear of it for too long, and does not use it any more.
            self._number = None

    def _unregister(self) -> None:
        number, self._number = self._number, None
        if number is not None:
            self._store.release_resource(self._name, self._holder, number)

    def _drain(self, drain_s: float) -> None:
        """Wait until the training sends no more calls, and those that run have ended; unload the adapters."""
        deadline, number = time.monotonic() + drain_s, self._number
        noticed = min(deadline, time.monotonic() + self._lease_s)  # By a training that runs.
        try:
            self._unregister()
            while number is not None and self._store.get_resource(self._name, number) is not None:
                if self._waited_until(noticed):
                    break
            while self._server.running_calls() != 0:
                if self._waited_until(deadline):
                    break
            for name in self._loaded:
                self._server.unload(name)
        except AglError as error:
            logger.warning("the engine was not drained: %s", error)

    def _waited_until(self, deadline: float) -> bool:
        """Waits a moment; whether it is time to go."""
        return self._hurry.wait(_LOOK_S) or time.monotonic() > deadline
