"""Decides the pending rollouts of a store. Any number of processes may do that over one store at the same time.

A restart loses nothing: pending spans and decisions are rows, the first decision on a unit stays,
and to carry one out twice does no harm.
"""

import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

from agl import otlp
from agl.config import TrafficSamplingConfig
from agl.sampling.pending import PendingRollout, PendingSpan, pending_rollouts
from agl.sampling.rule import Unit, decide, decide_in_window, window_threshold
from agl.sampling.summary import Summary
from agl.store import Attempt, RolloutState
from agl.store.background import repeating
from agl.store.span_row import SpanRow, row_of
from agl.store.traffic import Place, TrafficStore
from agl.trajectory import Decision, SamplingReason, read_sampled

logger = logging.getLogger(__name__)

KEEP_ALL: Final = TrafficSamplingConfig(base_rate=1, max_span_per_minute=None, decision_wait_s=0, grace_s=0)
"""For the spans that are still pending when sampling is turned off."""
_MINUTE_NS: Final = 60 * 10**9
_SETTLED_NS: Final = 2 * 10**9
"""After this time the spans that arrived in a minute are committed."""
_SPANS_PER_READ: Final = 1000
_UNITS_PER_WRITE: Final = 100


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A unit that can be decided, with the pending spans that it had when it was summed up."""

    key: str
    unit: Unit
    places: frozenset[Place]
    summaries: Sequence[Summary]


class Sampler:
    """Decides the pending rollouts of `store` by the rules of `config`; `run_once` is called again and again."""

    def __init__(self, store: TrafficStore, config: TrafficSamplingConfig) -> None:
        self._store = store
        self._config = config
        self._spans: dict[Place, PendingSpan] = {}
        self._candidates: dict[str, _Candidate] = {}
        """Those that wait for the end of their minute."""
        self._never_queued: set[str] = set()
        self._told: set[str] = set()
        """Services whose rollouts are longer than the limit."""

    def run_once(self, now_ns: int | None = None) -> int:
        """Decide what can be decided, and carry it out; returns the number of units."""
        pending = self._store.list_pending()
        now_ns = now_ns or pending.now_ns
        self._read(pending.arrived_ns)
        rollouts = pending_rollouts(self._spans.values())
        self._never_queued &= rollouts.keys()
        ready = dict(self._ready(rollouts.values(), now_ns))
        self._candidates = {key: candidate for key, candidate in self._candidates.items() if key in ready}
        late = {key for key, (_, some) in ready.items() if self._settle_late(some)}
        for key, (ready_ns, some) in ready.items():
            if key not in late and (candidate := self._candidate(key, ready_ns, some)):
                self._candidates[key] = candidate
        proposed = self._propose(now_ns)
        keys = list(proposed)
        for first in range(0, len(keys), _UNITS_PER_WRITE):
            self._decide({key: proposed[key] for key in keys[first : first + _UNITS_PER_WRITE]})
        return len(proposed)

    def _read(self, arrived_ns: Mapping[Place, int]) -> None:
        """Read the spans that are new, and forget those that are not pending any more."""
        self._spans = {place: span for place, span in self._spans.items() if place in arrived_ns}
        new = [place for place in arrived_ns if place not in self._spans]
        for first in range(0, len(new), _SPANS_PER_READ):
            bodies = self._store.read_pending(new[first : first + _SPANS_PER_READ])
            for place, body in bodies.items():
                self._spans[place] = PendingSpan.of(place, arrived_ns[place], body)

    def _ready(
        self, rollouts: Iterable[PendingRollout], now_ns: int
    ) -> Iterator[tuple[str, tuple[int, list[PendingRollout]]]]:
        """Key of each unit all of whose rollouts can be decided, since when, and the rollouts."""
        units: dict[str, list[PendingRollout]] = defaultdict(list)
        for rollout in rollouts:
            group_id = rollout.group_id
            units[_key_of(rollout.rollout_id) if group_id is None else f"group {group_id}"].append(rollout)
        for key, some in units.items():
            ready_ns = max(map(self._ready_ns, some))
            if ready_ns <= now_ns:
                yield key, (int(ready_ns), some)

    def _ready_ns(self, rollout: PendingRollout) -> float:
        queued = self._store.get_rollout(rollout.rollout_id) if self._may_be_queued(rollout) else None
        if queued is None:
            self._never_queued.add(rollout.rollout_id)
        elif not queued.state.is_over:
            return math.inf
        grace_ns, wait_ns = (int(s * 1e9) for s in (self._config.grace_s, self._config.decision_wait_s))
        return rollout.ready_ns(queued.ended_ns if queued else None, grace_ns, wait_ns)

    def _may_be_queued(self, rollout: PendingRollout) -> bool:
        """A rollout is queued before its first attempt."""
        has_attempt = any(span.has_attempt for span in rollout.spans)
        return has_attempt and rollout.rollout_id not in self._never_queued

    def _settle_late(self, rollouts: Sequence[PendingRollout]) -> bool:
        """Carry out the earlier decision on a trace that names no rollout, and of which a stored rollout is."""
        (first, *others) = rollouts
        if others or first.is_named:
            return False
        owners = [name for name in self._store.rollouts_of_trace(first.rollout_id) if name != first.rollout_id]
        if not owners:
            return False
        owner = PendingRollout(min(owners), first.spans)
        sampled = read_sampled(self._store.query_spans(owner.rollout_id))
        keeps_all = Decision(owner.rollout_id, True, SamplingReason.MODE, 0)
        candidate = self._candidate(f"trace {first.rollout_id}", 0, [owner])
        if candidate:
            self._settle([(candidate, keeps_all if sampled is None else sampled.decision)])
        return True

    def _candidate(self, key: str, ready_ns: int, rollouts: Sequence[PendingRollout]) -> _Candidate | None:
        """The unit summed up; None if another process has decided it meanwhile."""
        places = frozenset(span.place for rollout in rollouts for span in rollout.spans)
        known = self._candidates.get(key)
        if known is not None and known.places == places:
            return known
        bodies = self._store.read_pending(list(places))
        summaries = [
            Summary.of(
                rollout,
                otlp.decode(b"".join(bodies[span.place] for span in rollout.spans if span.place in bodies)),
                self._queued_error(rollout),
            )
            for rollout in rollouts
            if any(span.place in bodies for span in rollout.spans)
        ]
        if not summaries:
            return None
        first = summaries[0]
        rewards = [summary.reward for summary in summaries if summary.reward is not None]
        unit = Unit(
            first.group_id or first.rollout_id,
            first.service,
            ready_ns // _MINUTE_NS,
            sum(summary.spans for summary in summaries),
            max(rewards, default=None),
            any(summary.error is not None for summary in summaries),
            next((summary.mode for summary in summaries if summary.mode != "prod"), "prod"),
        )
        return _Candidate(key, unit, places, summaries)

    def _queued_error(self, rollout: PendingRollout) -> str | None:
        queued = self._store.get_rollout(rollout.rollout_id) if self._may_be_queued(rollout) else None
        if queued is None or queued.state is not RolloutState.FAILED:
            return None
        attempts: list[Attempt] = self._store.query_attempts(rollout.rollout_id)
        return (attempts[-1].error if attempts else None) or "the rollout failed"

    def _propose(self, now_ns: int) -> dict[str, Decision]:
        """A decision on each candidate, except those whose minute is not over."""
        proposed: dict[str, Decision] = {}
        windows: dict[tuple[str, int], list[_Candidate]] = defaultdict(list)
        for key, candidate in self._candidates.items():
            unit = candidate.unit
            if (decision := decide(unit, self._config)) is not None:
                proposed[key] = decision
            elif (unit.minute + 1) * _MINUTE_NS + _SETTLED_NS <= now_ns:
                windows[unit.service, unit.minute].append(candidate)
        if windows:
            names = {window: f"window {window[1]} {window[0]}" for window in windows}
            thresholds = self._store.decide(
                {
                    names[window]: f"{window_threshold([each.unit for each in some], self._config):x}"
                    for window, some in windows.items()
                }
            )
            for window, some in windows.items():
                threshold = int(thresholds[names[window]], 16)
                proposed |= {each.key: decide_in_window(each.unit, threshold) for each in some}
        return proposed

    def _decide(self, proposed: Mapping[str, Decision]) -> None:
        """Propose these decisions, and carry out those that count: the first ones."""
        texts = {key: json.dumps(decision.attributes()) for key, decision in proposed.items()}
        decided = self._store.decide(texts)
        # A late span may name its rollout only: then the decision on the group is that on the rollout.
        members = {
            _key_of(summary.rollout_id): decided[key]
            for key in decided
            for summary in self._candidates[key].summaries
            if summary.group_id is not None
        }
        if members:
            self._store.decide(members)
        decisions = {key: Decision.read(json.loads(text)) for key, text in decided.items()}
        self._settle([(self._candidates.pop(key), decision) for key, decision in decisions.items()])

    def _settle(self, decided: Sequence[tuple[_Candidate, Decision]]) -> None:
        kept = [place for candidate, decision in decided if decision.kept for place in candidate.places]
        rows: list[SpanRow] = [row_of(body) for body in self._store.read_pending(kept).values()]
        for candidate, decision in decided:
            for summary in candidate.summaries:
                rows += map(SpanRow.of, summary.records(decision))
            if decision.reason is SamplingReason.TOO_LONG:
                self._tell(candidate.unit)
        self._store.append_rows(rows)
        # Last: after a failure before this the same is done again.
        self._store.delete_pending([place for candidate, _ in decided for place in candidate.places])

    def _tell(self, unit: Unit) -> None:
        if unit.service not in self._told:
            self._told.add(unit.service)
            logger.warning(
                "sampling: %s of service %s has %d spans, more than sampling.max_span_per_minute %s allows, so such "
                "rollouts are never kept by chance; raise it",
                unit.name,
                unit.service,
                unit.spans,
                self._config.max_span_per_minute,
            )


def _key_of(rollout_id: str) -> str:
    return f"rollout {rollout_id}"


def sampling(
    stores: Iterable[TrafficStore], config: TrafficSamplingConfig, every_s: float = 1.0
) -> AbstractContextManager[None]:
    """Decide the pending rollouts of `stores` every `every_s` seconds in a thread, which logs an error and goes on."""
    failure = "sampling could not decide the rollouts of {}, and tries again"
    jobs = {failure.format(store.uri): Sampler(store, config).run_once for store in stores}
    return repeating("agl-sampler", jobs, every_s, logger)
