"""Production traffic that is not decided yet: sampling decides which of its rollouts are kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

from agl.errors import StoreError
from agl.store.protocol import Store
from agl.store.span_row import SpanRow

Place = Any
"""Key of a pending span, never of another one after its deletion; each backend has its own."""
PROD: Final = "prod"


@dataclass(frozen=True, slots=True)
class Pending:
    """The pending spans, with the arrival of each by the clock of the store, and the time by that clock."""

    arrived_ns: Mapping[Place, int]
    now_ns: int


@runtime_checkable
class TrafficStore(Store, Protocol):
    """A store that also keeps pending spans and decisions, in the process that opens its database.

    A pending span is as durable as any other. No verb of `Store` finds it: it is stored again if its rollout is kept.
    """

    def append_pending(self, rows: Sequence[SpanRow], *, now_ns: int | None = None) -> None:
        """Store spans as pending, all or none, and heartbeats of the attempts that they name.

        A span that is sent again may be pending twice.
        """
        ...

    def list_pending(self) -> Pending: ...

    def read_pending(self, places: Sequence[Place]) -> dict[Place, bytes]:
        """The OTLP requests of these spans, without those that are not pending any more."""
        ...

    def delete_pending(self, places: Sequence[Place]) -> None: ...

    def decide(self, proposed: Mapping[str, str]) -> dict[str, str]:
        """The decision on each name: the first that any process proposed. It stays until `gc` deletes it by its age."""
        ...

    def rollouts_of_trace(self, trace_id: str) -> list[str]:
        """The rollouts that the stored spans of a trace name."""
        ...


@dataclass(frozen=True, slots=True)
class Intake:
    """Where senders append spans to `store` if it is sampled."""

    store: TrafficStore

    def append_rows(self, rows: Sequence[SpanRow]) -> int:
        """Store `rows`: as pending the spans of production rollouts. Returns their number.

        A span that states no mode has that of its queued rollout, else that of its trace in `rows`, else `prod`.
        """
        unknown = {row.rollout_id for row in rows if row.mode is None and row.rollout_id is not None}
        queued = {name: rollout.mode for name, rollout in self.store.get_rollouts(sorted(unknown)).items()}
        modes = [row.mode or queued.get(row.rollout_id or "") for row in rows]
        other_traces = {row.trace_id for row, mode in zip(rows, modes, strict=True) if mode not in (None, PROD)}
        kept: list[SpanRow] = []
        traffic: list[SpanRow] = []
        for row, mode in zip(rows, modes, strict=True):
            is_other = row.trace_id in other_traces if mode is None else mode != PROD
            (kept if is_other else traffic).append(row)
        if traffic:
            self.store.append_pending(traffic)
        if kept:
            self.store.append_rows(kept)
        return len(rows)


def intake_of(store: Store) -> Intake:
    """Where senders append spans to `store`. Raises StoreError for the store of another server."""
    if not isinstance(store, TrafficStore):
        raise StoreError(f"the server of {store.uri} samples: move `sampling` to the configuration of that one")
    return Intake(store)
