"""What a training and its engines on other machines tell each other, as resources of the store.

The training writes what it wants; each engine writes where it is and what it has loaded, and leases that. The names of
these resources have a space, unlike those of published adapters.
"""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from agl.config import Base
from agl.store import Resource, Store


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)

    def metadata(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    @classmethod
    def of(cls, resource: Resource) -> Self:
        return cls.model_validate(dict(resource.metadata))


class WantedVersion(_Record):
    """A version of an adapter, whose files are a resource of the store."""

    resource: str
    digest: str
    """Of its files: a training that resumes may make another version of the same name."""
    factor: int = 1
    """Amplifies it, for its proof."""
    engine: str | None = None
    """URL of the only engine that is to load it; None: all."""


class Refusal(_Record):
    """Why the training does not use a registration of an engine."""

    holder: str
    reason: str


class Wanted(_Record):
    """What a training wants of its engines."""

    base: Mapping[str, str]
    """Fingerprint of the base model."""
    roles: tuple[str, ...]
    """Adapters of these roles that it does not want are to be unloaded."""
    versions: Mapping[str, WantedVersion] = {}
    """By the name under which they are served."""
    refused: Mapping[str, Refusal] = {}
    """By URL the last one."""
    is_over: bool = False

    def for_engine(self, url: str) -> dict[str, WantedVersion]:
        return {name: version for name, version in self.versions.items() if version.engine in (None, url)}


class Registration(_Record):
    """An engine, as it was when it last wrote. It registers again, as the next version, when it has restarted."""

    url: str
    """Base URL for the training, which ends in `/v1`."""
    holder: str
    """Of the lease; random, and another one for each registration."""
    loaded: Mapping[str, str] = {}
    """Name and digest of the loaded versions."""
    failed: Mapping[str, str] = {}
    """Name of versions that cannot be loaded, and the reason."""


def fleet_name(run: str, base: Base) -> str:
    """The `run` of the functions below for the engines of `base`."""
    return f"{run}/{base.name}" if base.is_one_of else run


def wanted_name(run: str) -> str:
    return f"wanted of {run}"


def files_name(run: str, version: str) -> str:
    return f"{files_prefix(run)}{version}"


def files_prefix(run: str) -> str:
    return f"files of {run}: "


def engine_name(run: str, url: str) -> str:
    return f"{engine_prefix(run)}{url}"


def engine_prefix(run: str) -> str:
    return f"engine of {run}: "


def put_wanted(store: Store, run: str, wanted: Wanted) -> None:
    store.put_resource(Resource(wanted_name(run), 0, "", wanted.metadata()))


def get_wanted(store: Store, run: str) -> Wanted | None:
    found = store.get_resource(wanted_name(run))
    return Wanted.of(found) if found else None
