"""What the plain rule, the evidence and the guards say together about a canary."""

import sys
from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from typing import Any, Literal

from agl.canary.evidence import Outcome, differences, wealth
from agl.canary.history import Canary, Event
from agl.canary.observation import Observed, observe
from agl.canary.table import Day, Sample, by_day, days_running, quantile
from agl.store import Store

Action = Literal["promoted", "rolled_back", "stopped", "wait"]
"""The event that is due, or none."""
_SLOW_SHARE = 0.05
"""Share of rollouts beyond the 95th percentile."""
_NAMED = 3
"""At most so many calls or rollouts are named in a sentence."""


@dataclass(frozen=True, slots=True)
class Wealth:
    """The most that each e-process ever reached; from 1 / alpha on it is evidence."""

    better: float
    """The candidate earns more."""
    worse: float
    """The candidate earns less."""
    errors: float
    """It fails more often, by more than `guard.errors`."""
    slow: float
    """More than 5 % of its rollouts take longer than `guard.p95_latency` times the current version's p95."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do, why, and all that it follows from."""

    action: Action
    reason: str
    days: list[Day]
    days_running: int
    """Complete days running on which the rule's ratio was exceeded."""
    wealth: Wealth
    needed: float
    """1 / alpha."""
    observed: Observed
    notes: list[str]
    """What is missing, and what to do about it."""

    def evidence(self) -> dict[str, Any]:
        """For the history, as a JSON value."""
        return {
            "days": [asdict(day) for day in self.days],
            "days_running": self.days_running,
            "wealth": {name: _finite(value) for name, value in asdict(self.wealth).items()},
            "needed": self.needed,
            "in_both_arms": self.observed.in_both_arms,
            "unproved": [asdict(call) for call in self.observed.unproved],
            "would": self.action,
            "because": self.reason,
        }


def judge(store: Store, event: Event, now_ns: int) -> Verdict:
    """Of the canary of `event`, by what the store has. Raises CanaryError for a reward out of range."""
    observed = observe(store, event.canary)
    return judge_observed(observed, event.canary, now_ns)


def judge_observed(observed: Observed, canary: Canary, now_ns: int) -> Verdict:
    settings, samples = canary.settings, observed.samples
    days = by_day(samples, (settings.lowest_reward, settings.highest_reward))
    today = datetime.fromtimestamp(now_ns / 1e9, UTC).date().isoformat()
    complete = _without_gaps([day for day in days if day.date < today])
    running = days_running([day and day.ratio for day in complete], settings.promote.policy_improvement_ratio)
    reached = _wealth(samples, canary)
    action, reason = _decide(observed, canary, running, reached)
    notes = _notes(samples, days, canary)
    return Verdict(action, reason, days, running, reached, 1 / settings.promote.alpha, observed, notes)


def _decide(observed: Observed, canary: Canary, running: int, reached: Wealth) -> tuple[Action, str]:
    promote, guard = canary.settings.promote, canary.settings.guard
    needed = 1 / promote.alpha
    if observed.unproved:
        named = "; ".join(
            f"call {call.span_id} of rollout {call.rollout_id} by {call.answered} in place of {call.expected}"
            for call in observed.unproved[:_NAMED]
        )
        number = len(observed.unproved)
        return (
            "stopped",
            f"calls that the version of their arm did not answer: {number}, e.g. {named}; see that every engine has "
            "loaded it",
        )
    if reached.worse >= needed:
        return "rolled_back", f"the candidate earns less: K {reached.worse:.1f} of {needed:g}"
    if reached.errors >= needed:
        return (
            "rolled_back",
            f"the candidate fails more often, by over {guard.errors:.0%}: K {reached.errors:.1f} of {needed:g}",
        )
    if reached.slow >= needed:
        return (
            "rolled_back",
            f"the candidate's p95 latency is over {guard.p95_latency:g} times as high: K {reached.slow:.1f} of "
            f"{needed:g}",
        )
    rewarded = sum(sample.is_candidate and sample.reward is not None for sample in observed.samples)
    conditions = [
        (reached.better >= needed, f"evidence that it earns more: K {reached.better:.1f} (needed: {needed:g})"),
        (
            running >= promote.days,
            f"days running with a ratio above {promote.policy_improvement_ratio:g}: {running} (needed: {promote.days})",
        ),
        (rewarded >= promote.min_rollouts, f"rewarded rollouts: {rewarded} (needed: {promote.min_rollouts})"),
    ]
    if all(is_met for is_met, _ in conditions):
        return "promoted", "the candidate has " + ", ".join(text for _, text in conditions)
    return "wait", "the candidate still lacks " + ", ".join(text for is_met, text in conditions if not is_met)


def _wealth(samples: Sequence[Sample], canary: Canary) -> Wealth:
    guard = canary.settings.guard
    rewarded = sorted(
        (sample for sample in samples if sample.reward is not None), key=lambda sample: sample.rewarded_ns
    )
    gains = list(differences(_outcomes(rewarded, lambda sample: sample.reward or 0.0)))
    failures = differences(_outcomes(samples, lambda sample: float(sample.failed)))
    return Wealth(
        better=max(wealth(gains), default=1.0),
        worse=max(wealth(-gain for gain in gains), default=1.0),
        errors=max(wealth((gain - guard.errors for gain in failures), 1 + guard.errors), default=1.0),
        slow=max(wealth(_late(samples, canary), _SLOW_SHARE), default=1.0),
    )


def _late(samples: Iterable[Sample], canary: Canary) -> Iterator[float]:
    """For each rollout of the candidate: 1 if it was too slow, else 0, minus the share that may be.

    It is compared with those of the current version that ended before it, once they are `min_rollouts`: a bet must not
    depend on the future. `samples` are in the order in which they ended.
    """
    before: list[float] = []
    for sample in samples:
        if not sample.is_candidate:
            insort(before, sample.latency_s)
        elif len(before) >= canary.settings.promote.min_rollouts:
            slowest = quantile(before, 1 - _SLOW_SHARE) or 0.0
            yield float(sample.latency_s > canary.settings.guard.p95_latency * slowest) - _SLOW_SHARE


def _outcomes(samples: Iterable[Sample], value: Callable[[Sample], float]) -> Iterable[Outcome]:
    return (Outcome(sample.is_candidate, value(sample), sample.fraction) for sample in samples)


def _without_gaps(days: Sequence[Day]) -> list[Day | None]:
    """The days from the first to the last; None for a date without a rollout, which ends a row of days."""
    by_date = {date.fromisoformat(day.date).toordinal(): day for day in days}
    return [by_date.get(number) for number in range(min(by_date), max(by_date) + 1)] if by_date else []


def _notes(samples: Sequence[Sample], days: Sequence[Day], canary: Canary) -> list[str]:
    if not samples:
        roles = ", ".join(canary.candidate)
        return [
            f"no production rollout has called {roles} since the canary began; calls count if they go through a "
            "gateway of this store, in mode prod, with the role as model, or a name that gateway.models maps to it"
        ]
    if not any(sample.reward is not None for sample in samples):
        return [
            f"none of {len(samples)} rollouts has a reward, without which there is no evidence: call agl.emit_reward "
            "in the agent, or emit a user's feedback in `agl.joined` with the rollout's headers"
        ]
    notes = []
    for name, arms in (
        ("the current version", [day.current for day in days]),
        ("the candidate", [day.candidate for day in days]),
    ):
        if without := [day.date for day, arm in zip(days, arms, strict=True) if not arm.rewards]:
            notes.append(
                f"{name} has no reward on {', '.join(without)}, which ends a row of days: send it more traffic "
                "(canary.fraction), or see that rewards are emitted"
            )
    if any(day.current.mean == 0 for day in days):
        notes.append("the current version's mean is 0 on a day, which therefore has no ratio; the evidence counts it")
    return notes


def _finite(value: float) -> float:
    """JSON has no infinity."""
    return min(value, sys.float_info.max)
