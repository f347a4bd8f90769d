"""What a person may know of a rollout that sampling has not decided yet."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from agl import otlp
from agl.sampling.pending import PendingRollout, PendingSpan, pending_rollouts
from agl.span import Span
from agl.store.traffic import TrafficStore


@dataclass(frozen=True, slots=True)
class Undecided:
    """The pending spans of a rollout, since when it is pending, and what its decision waits for."""

    spans: list[Span]
    since_ns: int
    now_ns: int
    waits_for: str

    @classmethod
    def of(cls, store: TrafficStore, rollout_id: str) -> Self | None:
        """None if no span of the rollout is pending. Reads all pending spans."""
        pending = store.list_pending()
        bodies = store.read_pending(list(pending.arrived_ns))
        found = [PendingSpan.of(place, pending.arrived_ns[place], body) for place, body in bodies.items()]
        rollouts = pending_rollouts(found)
        rollout = rollouts.get(rollout_id)
        if rollout is None:
            return None
        group_id = rollout.group_id
        unit = [
            rollout,
            *(one for one in rollouts.values() if one is not rollout and group_id and one.group_id == group_id),
        ]
        queued = store.get_rollouts([one.rollout_id for one in unit if one.has_attempt])
        running = {name for name, one in queued.items() if not one.state.is_over}
        over = {name for name in queued if name not in running}
        reasons = [
            reason for one in unit for reason in _reasons(one, one.rollout_id in running, one.rollout_id in over)
        ]
        spans = otlp.decode(b"".join(bodies[span.place] for span in rollout.spans))
        since_ns = min(span.arrived_ns for span in rollout.spans)
        decided = "its next pass, or the end of the minute if base_rate keeps it: so max_span_per_minute is applied"
        return cls(spans, since_ns, pending.now_ns, next(iter(reasons), decided))

    def describe(self) -> str:
        """One line."""
        waited_s = max(0, self.now_ns - self.since_ns) / 1e9
        return f"pending for {waited_s:.0f} s: sampling has not decided it yet, and waits for {self.waits_for}"


def _reasons(rollout: PendingRollout, is_running: bool, is_over: bool) -> Iterator[str]:
    name = rollout.rollout_id
    if is_running:
        yield f"the end of {name}, which is queued or running"
    elif not is_over and not rollout.ends_ns:
        yield f"the root span of {name}, or for decision_wait_s after its last span"
    elif not any(span.has_reward for span in rollout.spans):
        yield f"a reward of {name}, which is over, or for grace_s"
