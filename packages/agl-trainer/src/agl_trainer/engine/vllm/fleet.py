"""The engines of other machines that serve a training, as they come and go. `agl engine` runs beside each of them."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self

from agl.errors import TrainingError
from agl.store import Resource, Store
from agl.store.background import repeating
from agl.store.files import content_digest, publish
from agl_trainer.engine.vllm.registry import (
    Refusal,
    Registration,
    Wanted,
    WantedVersion,
    engine_name,
    engine_prefix,
    files_name,
    files_prefix,
    put_wanted,
)
from agl_trainer.engine.vllm.server import EngineGoneError, VllmServer

logger = logging.getLogger(__name__)

_LOOKS_PER_LEASE: Final = 5
_LONGEST_LOOK_S: Final = 2.0
_POLL_S: Final = 0.2
_LOAD_S: Final = 600.0
"""Longest time until an engine has fetched and loaded a version."""


class RemoteServer(VllmServer):
    """A vLLM server on another machine: `agl engine` loads and unloads its adapters, all else goes over HTTP."""

    def __init__(self, fleet: "Fleet", registration: Resource, headers: Mapping[str, str]) -> None:
        super().__init__(registration.uri, headers)
        self._fleet = fleet
        self.holder = Registration.of(registration).holder
        """Of its registration, which ends when it restarts."""

    def load(self, name: str, folder: Path, factor: int = 1) -> None:
        digest = self._fleet.want(self, name, folder, factor)
        deadline = time.monotonic() + _LOAD_S
        while time.monotonic() < deadline:
            state = self._fleet.registration(self)
            if state is None:
                raise EngineGoneError(f"the engine at {self.url} has ended, or does not report any more")
            if name in state.failed:
                raise TrainingError(f"the engine at {self.url} cannot load {name}: {state.failed[name]}")
            if state.loaded.get(name) == digest:
                return
            time.sleep(_POLL_S)
        raise TrainingError(f"the engine at {self.url} did not load {name} within {_LOAD_S:g} s")

    def unload(self, name: str) -> None:
        """Only of versions that no other engine has; `RemoteEngine` decides about the others."""
        self._fleet.unwant(name, only_for=self.url)


class Fleet:
    """The engines that have registered for `run` in `store`, and what is wanted of them. Thread-safe.

    `on_use` is called with the URL of each engine that is used from now on, and `on_drop` with that of one that is not
    used any more: from a thread of the fleet if it has ended.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        wanted: Wanted,
        *,
        lease_s: float,
        headers: Mapping[str, str],
        on_use: Callable[[str], None],
        on_drop: Callable[[str], None],
    ) -> None:
        self._store = store
        self._run = run
        self._wanted = wanted
        self._headers = headers
        self._on_use = on_use
        self._on_drop = on_drop
        self._lock = threading.RLock()
        self._in_use: list[RemoteServer] = []
        self._every_s = min(_LONGEST_LOOK_S, lease_s / _LOOKS_PER_LEASE)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._delete_files(resource.name for resource in self._store.query_resources(files_prefix(self._run)))
        self._write(self._wanted)
        job = {"the engines are not watched": self.look}
        self._stack.enter_context(repeating("agl-engines", job, self._every_s, logger))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        with self._lock:
            self._delete_files({version.resource for version in self._wanted.versions.values()})
            self._write(self._wanted.model_copy(update={"versions": {}, "is_over": True}))

    def look(self) -> dict[str, Resource]:
        """The engines that report, by URL; those that have ended are taken out of use."""
        with self._lock:
            found = self._store.query_resources(engine_prefix(self._run))
            present = {resource.uri: resource for resource in found}  # By version: the last one is the newest.
            self._drop_ended(present)
            for resource in found:
                if present[resource.uri] is not resource:  # An engine that has started again waits for this.
                    self._store.release_resource(resource.name, Registration.of(resource).holder, resource.version)
            for newest in [*present.values()]:
                ended = self._store.collect_resources(newest.name, keep=0)
                if newest.version in [resource.version for resource in ended]:
                    del present[newest.uri]
            self._drop_ended(present)
            return present

    def arrivals(self) -> list[RemoteServer]:
        """The engines that are not in use yet, and were not refused."""
        with self._lock:
            found = [RemoteServer(self, each, self._headers) for each in self.look().values()]
            known = {one.holder for one in (*self._in_use, *self._wanted.refused.values())}
            return [server for server in found if server.holder not in known]

    def use(self, server: RemoteServer) -> None:
        """Send calls to `server` from now on."""
        with self._lock:
            self._in_use.append(server)
            self._on_use(server.url)

    def in_use(self) -> list[RemoteServer]:
        with self._lock:
            return list(self._in_use)

    def drop(self, servers: Sequence[RemoteServer]) -> None:
        """Send no more calls to `servers`."""
        with self._lock:
            for server in [server for server in self._in_use if server in servers]:
                self._in_use.remove(server)
                self._on_drop(server.url)
                logger.warning("the engine at %s has left; engines in use: %d", server.url, len(self._in_use))

    def refuse(self, server: RemoteServer, reason: str) -> None:
        """Do not use `server` any more; `agl engine` ends with the reason."""
        logger.warning("the engine at %s is not used: %s", server.url, reason)
        with self._lock:
            self.drop([server])
            refused = {**self._wanted.refused, server.url: Refusal(holder=server.holder, reason=reason)}
            self._write(self._wanted.model_copy(update={"refused": refused}))

    def want(self, server: RemoteServer, name: str, folder: Path, factor: int) -> str:
        """Have all engines load the adapter in `folder` as `name`, amplified only `server`; returns its digest."""
        with self._lock:
            if (known := self._wanted.versions.get(name)) is not None:
                return known.digest
            resource = files_name(self._run, folder.name)
            digests = {version.resource: version.digest for version in self._wanted.versions.values()}
            if (digest := digests.get(resource)) is None:
                digest = content_digest(publish(self._store, resource, 0, folder))
            engine = None if factor == 1 else server.url
            version = WantedVersion(resource=resource, digest=digest, factor=factor, engine=engine)
            self._write(self._wanted.model_copy(update={"versions": {**self._wanted.versions, name: version}}))
            return digest

    def unwant(self, name: str, only_for: str | None = None) -> None:
        """Have the engines unload a version, if that is wanted of all, or of the engine `only_for`."""
        with self._lock:
            versions = dict(self._wanted.versions)
            if name not in versions or versions[name].engine != only_for:
                return
            gone = {versions.pop(name).resource} - {version.resource for version in versions.values()}
            self._write(self._wanted.model_copy(update={"versions": versions}))
            self._delete_files(gone)

    def registration(self, server: RemoteServer) -> Registration | None:
        """What `server` reported last; None if it does not report any more."""
        found = self._store.get_resource(engine_name(self._run, server.url))
        state = Registration.of(found) if found else None
        return state if state and state.holder == server.holder else None

    def _drop_ended(self, present: Mapping[str, Resource]) -> None:
        holders = {Registration.of(resource).holder for resource in present.values()}
        self.drop([server for server in self._in_use if server.holder not in holders])

    def _write(self, wanted: Wanted) -> None:
        put_wanted(self._store, self._run, wanted)
        self._wanted = wanted

    def _delete_files(self, names: Iterable[str]) -> None:
        for name in names:
            self._store.collect_resources(name, keep=0)
