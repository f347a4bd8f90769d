"""Canaries: what answers production, what was decided and on which evidence, and both arms by day."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from agl.canary.history import Event, all_events
from agl.canary.verdict import judge
from agl.errors import UnknownIdError
from agl.store import Store


@dataclass(frozen=True, slots=True)
class CanaryView:
    """The last canary, and the evidence that its last decision recorded or that was read just now."""

    events: Sequence[Event]
    """The newest first; not empty."""
    evidence: Mapping[str, Any]

    @classmethod
    def of(cls, store: Store) -> Self | None:
        """With the evidence of the last event; None if there was no canary. Raises CanaryError."""
        events = all_events(store)[::-1]
        return cls(events, events[0].evidence) if events else None

    @classmethod
    def now(cls, store: Store) -> Self:
        """With the evidence that the store has now, for which all of its rollouts are read. Raises CanaryError."""
        events = all_events(store)[::-1]
        if not events:
            raise UnknownIdError(f"{store.uri} has no canary: begin one with `agl canary start`")
        return cls(events, judge(store, events[0], time.time_ns()).evidence())

    @property
    def last(self) -> Event:
        return self.events[0]
