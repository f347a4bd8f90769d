"""The events of canaries: versions of one resource in the store. The last event says what answers production.

An event has all that a gateway needs, so a promotion or a rollback, of however many roles, is one row.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, Literal

from pydantic import Field, ValidationError

from agl.config import CanaryConfig
from agl.config.section import Section
from agl.errors import CanaryError
from agl.store import Resource, Store

RESOURCE: Final = "canary"
EventKind = Literal["started", "raised", "promoted", "rolled_back", "stopped"]


class Share(Section):
    """The candidate's share of rollouts from a time on."""

    since_ns: int
    fraction: float


class Canary(Section):
    """The candidate and the current version of each role, and the settings of the canary's start."""

    id: str
    candidate: Mapping[str, str]
    """Role to the engines' name of the version, e.g. `planner` to `planner@13`."""
    current: Mapping[str, str]
    shares: list[Share]
    """In order; the last is the present one."""
    settings: CanaryConfig

    def fraction_at(self, time_ns: int) -> float:
        began = [share.fraction for share in self.shares if share.since_ns <= time_ns]
        return (began or [self.shares[0].fraction])[-1]


class Event(Section):
    """One event in the history."""

    number: int
    """From 0; the version of the resource."""
    kind: EventKind
    at_ns: int
    by: str
    """Who decided: a person, or a server."""
    reason: str
    versions: Mapping[str, str]
    """What answers each role in production, outside of the candidate's share, from this event on."""
    canary: Canary
    evidence: Mapping[str, Any] = Field(default_factory=dict)
    """Table, wealth and rule as they were."""

    @property
    def is_running(self) -> bool:
        """Whether the candidate has a share."""
        return self.kind in ("started", "raised")

    def arm_versions(self, candidate: bool) -> Mapping[str, str]:
        """The version that answers each role for rollouts that begin after this event: role to the engines' name."""
        return {**self.versions, **self.canary.candidate} if candidate and self.is_running else self.versions

    def summary(self) -> str:
        arms = ", ".join(f"{name} for {self.canary.current[role]}" for role, name in self.canary.candidate.items())
        return f"{self.kind.replace('_', ' ')} {when(self.at_ns)} by {self.by}: {arms}; {self.reason}"


def last_event(store: Store) -> Event | None:
    """Raises CanaryError if it is of another version of this program."""
    return _read(store.get_resource(RESOURCE))


def event_at(store: Store, number: int) -> Event | None:
    return _read(store.get_resource(RESOURCE, number))


def all_events(store: Store) -> list[Event]:
    """From the first to the last."""
    found = [_read(resource) for resource in store.query_resources(RESOURCE) if resource.name == RESOURCE]
    return [event for event in found if event is not None]


def append_event(store: Store, event: Event) -> None:
    """Raises CanaryError if another event came first: whoever decided did not know of it."""
    written = Resource(RESOURCE, event.number, "", event.model_dump(mode="json"))
    first = _read(store.add_resource(written))
    if first is not None and first != event:
        raise CanaryError(f"nothing was done, because the canary was {first.summary()}; look at `agl canary status`")


def when(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _read(resource: Resource | None) -> Event | None:
    if resource is None:
        return None
    try:
        return Event.model_validate(resource.metadata)
    except ValidationError as error:
        raise CanaryError(
            f"event {resource.version} of the canaries in the store cannot be read; update agl-core ({error})"
        ) from error
