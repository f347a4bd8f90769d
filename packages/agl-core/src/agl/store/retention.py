"""Which rollouts `gc` may delete: the rule of every backend."""

from dataclasses import dataclass
from typing import Final, Self

from agl.errors import InputError
from agl.store.rollout import Rollout

IDLE_S: Final = 600.0
"""A rollout that was never queued has no end. It counts as over when no span of it arrived for so many seconds."""

_LONGEST_S: Final = 9e9
"""285 years, in nanoseconds a number of 64 bits."""

SPAN_OVERHEAD_BYTES: Final = 300
"""Estimated size of a span in the store besides its OTLP bytes: its row and its index entries."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one `gc`: deletes rollouts that were over before `before_ns`, and then down to `max_bytes`."""

    before_ns: int
    max_bytes: int | None
    now_ns: int

    @classmethod
    def of(cls, older_than_s: float | None, max_bytes: int | None, now_ns: int) -> Self:
        """Raises InputError for a limit out of range."""
        if older_than_s is not None and not 0 <= older_than_s <= _LONGEST_S:
            raise InputError(f"older_than_s is {older_than_s:g}, expected seconds from 0 to {_LONGEST_S:g}")
        if max_bytes is not None and max_bytes < 0:
            raise InputError(f"max_bytes is {max_bytes}, expected a number of bytes from 0")
        return cls(0 if older_than_s is None else now_ns - int(older_than_s * 1e9), max_bytes, now_ns)

    def over_since(self, rollout: Rollout | None, last_arrival_ns: int) -> int | None:
        """Since when a rollout is over: its end or the arrival of its last span, whichever is later.

        None if it is not over. `rollout` is None for one that was never queued.
        """
        if rollout is None:
            return last_arrival_ns if last_arrival_ns < self.now_ns - IDLE_S * 1e9 else None
        return max(last_arrival_ns, rollout.ended_ns or 0) if rollout.state.is_over else None
