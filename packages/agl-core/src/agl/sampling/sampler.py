"""Decides the pending rollouts of a store. Any number of processes may do that over one store at the same time.

A restart loses nothing: pending spans and decisions are rows, and the first decision on a unit stays. A decision states
the spans that it is about, and so does a row for each time that late spans follow it: whoever carries it out sums up
these, so every span is counted once, and to carry it out twice does no harm.
"""

import ast
import itertools
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
from agl.store import Attempt, Rollout, RolloutState
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
_PLACES: Final = "places"
_OF_TRACE: Final = "trace "


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A unit that can be decided, with the pending spans that it had when it was summed up."""

    key: str
    unit: Unit
    rollouts: Sequence[PendingRollout]
    places: frozenset[Place]
    summaries: Sequence[Summary]


@dataclass(frozen=True, slots=True)
class _Claim:
    """Pending spans of a unit that were decided together."""

    candidate: _Candidate
    decision: Decision
    places: frozenset[Place]


class Sampler:
    """Decides the pending rollouts of `store` by the rules of `config`; `run_once` is called again and again."""

    def __init__(self, store: TrafficStore, config: TrafficSamplingConfig) -> None:
        self._store = store
        self._config = config
        self._spans: dict[Place, PendingSpan] = {}
        self._candidates: dict[str, _Candidate] = {}
        """Those that wait for the end of their minute."""
        self._queued: dict[str, Rollout] = {}
        """The pending rollouts that were queued, as of this pass."""
        self._never_queued: set[str] = set()
        self._told: set[str] = set()
        """Services whose rollouts are longer than the limit."""

    def run_once(self, now_ns: int | None = None) -> int:
        """Decide what can be decided, and carry it out; returns the number of units."""
        pending = self._store.list_pending()
        now_ns = now_ns or pending.now_ns
        self._read(pending.arrived_ns)
        rollouts = pending_rollouts(self._spans.values())
        self._find_queued(rollouts)
        ready = dict(self._ready(rollouts.values(), now_ns))
        late: dict[str, Decision] = {}
        candidates: dict[str, _Candidate] = {}
        for key, (ready_ns, some) in ready.items():
            name, members = key, some
            if (earlier := self._earlier_decision(some)) is not None:
                name, members = f"{_OF_TRACE}{some[0].rollout_id}", [PendingRollout(earlier[0], some[0].spans)]
            if candidate := self._candidate(name, ready_ns, members):
                candidates[name] = candidate
                if earlier is not None:
                    late[name] = earlier[1]
        self._candidates = candidates
        proposed = self._propose(now_ns, late)
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

    def _find_queued(self, rollouts: Mapping[str, PendingRollout]) -> None:
        """Read which of `rollouts` are queued: those with an attempt, before whose first they were queued."""
        self._never_queued &= rollouts.keys()
        wanted = {name for name, rollout in rollouts.items() if rollout.has_attempt} - self._never_queued
        self._queued = self._store.get_rollouts(sorted(wanted)) if wanted else {}
        self._never_queued |= wanted - self._queued.keys()

    def _ready_ns(self, rollout: PendingRollout) -> float:
        queued = self._queued.get(rollout.rollout_id)
        if queued is not None and not queued.state.is_over:
            return math.inf
        grace_ns, wait_ns = (int(s * 1e9) for s in (self._config.grace_s, self._config.decision_wait_s))
        return rollout.ready_ns(queued.ended_ns if queued else None, grace_ns, wait_ns)

    def _earlier_decision(self, rollouts: Sequence[PendingRollout]) -> tuple[str, Decision] | None:
        """The stored rollout of which a trace that names no rollout is, and the decision on it."""
        (first, *others) = rollouts
        if others or first.is_named:
            return None
        owners = [name for name in self._store.rollouts_of_trace(first.rollout_id) if name != first.rollout_id]
        if not owners:
            return None
        owner = min(owners)
        sampled = read_sampled(self._store.query_spans(owner))
        return owner, Decision(owner, True, SamplingReason.MODE, 0) if sampled is None else sampled.decision

    def _candidate(self, key: str, ready_ns: int, rollouts: Sequence[PendingRollout]) -> _Candidate | None:
        """The unit summed up; None if another process has decided it meanwhile."""
        places = frozenset(span.place for rollout in rollouts for span in rollout.spans)
        known = self._candidates.get(key)
        if known is not None and known.places == places:
            return known
        summaries = self._sum_up(rollouts, places, self._store.read_pending(list(places)))
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
        return _Candidate(key, unit, rollouts, places, summaries)

    def _sum_up(
        self, rollouts: Iterable[PendingRollout], places: frozenset[Place], bodies: Mapping[Place, bytes]
    ) -> list[Summary]:
        """A summary of each of `rollouts`, of those of its spans that are in `places` and have a body."""
        summaries: list[Summary] = []
        for rollout in rollouts:
            spans = [span for span in rollout.spans if span.place in places and span.place in bodies]
            if spans:
                part = PendingRollout(rollout.rollout_id, spans)
                found = otlp.decode(b"".join(bodies[span.place] for span in spans))
                group_id = rollout.group_id
                summaries.append(Summary.of(part, group_id, found, self._queued_error(rollout), _text_of(places)))
        return summaries

    def _queued_error(self, rollout: PendingRollout) -> str | None:
        queued = self._queued.get(rollout.rollout_id)
        if queued is None or queued.state is not RolloutState.FAILED:
            return None
        attempts: list[Attempt] = self._store.query_attempts(rollout.rollout_id)
        return (attempts[-1].error if attempts else None) or "the rollout failed"

    def _propose(self, now_ns: int, late: Mapping[str, Decision]) -> dict[str, Decision]:
        """A decision on each candidate, except those whose minute is not over. `late`: those that are decided."""
        proposed = dict(late)
        windows: dict[tuple[str, int], list[_Candidate]] = defaultdict(list)
        for key, candidate in self._candidates.items():
            unit = candidate.unit
            if key in late:
                continue
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
        """Propose these decisions, and carry out those that count: the first ones, on the spans that they state.

        Spans that the decision does not state follow it: by the first row that states them.
        """
        left = {key: self._candidates[key].places for key in proposed}
        decisions: dict[str, Decision] = {}
        for number in itertools.count():
            names = {key: f"late {number} {key}" if number else key for key in left}
            texts = {
                names[key]: json.dumps(proposed[key].attributes() | {_PLACES: _text_of(left[key])}) for key in left
            }
            stored = self._store.decide(texts)
            claims: list[_Claim] = []
            for key in list(left):
                record = json.loads(stored[names[key]])
                decision = decisions.setdefault(key, Decision.read(record))
                places = frozenset(ast.literal_eval(record.get(_PLACES, "()")))
                if left[key] & places:
                    claims.append(_Claim(self._candidates[key], decision, places))
                left[key] -= places
            left = {key: places for key, places in left.items() if places}
            if number == 0:
                self._decide_members(decisions)
            self._settle(claims)
            if not left:
                break
        for key in proposed:
            del self._candidates[key]

    def _decide_members(self, decisions: Mapping[str, Decision]) -> None:
        """Let a late span that names its rollout only find the decision on the group."""
        members = {
            _key_of(summary.rollout_id): json.dumps(decision.attributes())
            for key, decision in decisions.items()
            for summary in self._candidates[key].summaries
            if summary.group_id is not None
        }
        if members:
            self._store.decide(members)

    def _settle(self, claims: Sequence[_Claim]) -> None:
        wanted = [
            place
            for claim in claims
            if claim.decision.kept or claim.places != claim.candidate.places
            for place in claim.places
        ]
        bodies = self._store.read_pending(wanted) if wanted else {}
        rows: list[SpanRow] = []
        for claim in claims:
            if claim.decision.kept:
                rows += [row_of(bodies[place]) for place in claim.places if place in bodies]
            for summary in self._summaries_of(claim, bodies):
                rows += map(SpanRow.of, summary.records(claim.decision))
            if claim.decision.reason is SamplingReason.TOO_LONG:
                self._tell(claim.candidate.unit)
        self._store.append_rows(rows)
        # Last: after a failure before this the same is done again.
        self._store.delete_pending([place for claim in claims for place in claim.places])

    def _summaries_of(self, claim: _Claim, bodies: Mapping[Place, bytes]) -> Sequence[Summary]:
        candidate = claim.candidate
        if claim.places == candidate.places:
            return candidate.summaries
        if any(place not in bodies for place in claim.places):
            return []  # Another process has written them: it deletes last.
        seen = [PendingSpan.of(place, 0, bodies[place]) for place in claim.places - candidate.places]
        rollouts = pending_rollouts([*(span for rollout in candidate.rollouts for span in rollout.spans), *seen])
        is_late = candidate.key.startswith(_OF_TRACE)
        return self._sum_up(candidate.rollouts if is_late else rollouts.values(), claim.places, bodies)

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


def _text_of(places: Iterable[Place]) -> str:
    return repr(sorted(places))


def _key_of(rollout_id: str) -> str:
    return f"rollout {rollout_id}"


def sampling(
    stores: Iterable[TrafficStore], config: TrafficSamplingConfig, every_s: float = 1.0
) -> AbstractContextManager[None]:
    """Decide the pending rollouts of `stores` every `every_s` seconds in a thread, which logs an error and goes on."""
    failure = "sampling could not decide the rollouts of {}, and tries again"
    jobs = {failure.format(store.uri): Sampler(store, config).run_once for store in stores}
    return repeating("agl-sampler", jobs, every_s, logger)
