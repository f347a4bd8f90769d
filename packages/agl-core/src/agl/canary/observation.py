"""The rollouts of a canary, read from their spans: their arm, what they earned, and which version answered them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from agl import semconv
from agl.canary.history import Canary
from agl.canary.table import Sample
from agl.errors import CanaryError
from agl.span import AttributeValue, Span
from agl.store import Store
from agl.trajectory import build_trajectory
from agl.trajectory.reward import last_reward, read_reward

CANDIDATE, CURRENT = "candidate", "current"
_CLIENT_LEFT = "cancelled"


@dataclass(frozen=True, slots=True)
class Unproved:
    """A call that another version answered than that of its arm."""

    rollout_id: str
    span_id: str
    expected: str
    answered: str


@dataclass(frozen=True, slots=True)
class Observed:
    """All rollouts of a canary so far."""

    samples: list[Sample]
    """By the time at which they ended; without keys that were in both arms."""
    in_both_arms: int
    """Rollouts that were left out, because their key was in both arms."""
    unproved: list[Unproved]


def observe(store: Store, canary: Canary) -> Observed:
    """Reads the spans of every rollout in the store. Raises CanaryError for a reward out of range."""
    samples: list[Sample] = []
    unproved: list[Unproved] = []
    for rollout_id, spans in store.read_spans(store.rollout_ids()):
        found = measured(spans) or next(
            (span.attributes for span in spans if semconv.CANARY_BEGAN_NS in span.attributes), {}
        )
        if found.get(semconv.CANARY_ID) == canary.id:
            samples.append(_sample(rollout_id, spans, found, canary))
            unproved += [call for span in spans if (call := unproved_call(rollout_id, span))]
    arms: dict[str, set[bool]] = {}
    for sample in samples:
        arms.setdefault(sample.key, set()).add(sample.is_candidate)
    kept = [sample for sample in samples if len(arms[sample.key]) == 1]
    return Observed(sorted(kept, key=lambda sample: sample.ended_ns), len(samples) - len(kept), unproved)


def measured(spans: Sequence[Span]) -> dict[str, AttributeValue]:
    """What a canary counts of a rollout, as attributes of a span in which it outlives the others; empty if no role of a
    canary was called. Its reward and the error of the rollout as a whole are not among them.
    """
    made = (span for span in spans if span.name == semconv.SPAN_GATEWAY_CALL and span.text(semconv.CANARY_VERSION))
    calls = sorted(made, key=lambda call: call.start_ns)
    if not calls:
        return {}
    began, ended = calls[0].start_ns, max(call.end_ns for call in calls)
    root = next((span for span in spans if span.name == semconv.SPAN_ROLLOUT), None)
    arm = {name: calls[0].text(name) or "" for name in (semconv.CANARY_ID, semconv.CANARY_ARM, semconv.CANARY_KEY)}
    return {
        **arm,
        semconv.CANARY_BEGAN_NS: began,
        semconv.CANARY_ENDED_NS: ended,
        semconv.CANARY_LATENCY_NS: root.end_ns - root.start_ns if root else ended - began,
        semconv.CANARY_FAILED: any(
            call.status == "error" and call.text(semconv.ERROR_TYPE) != _CLIENT_LEFT for call in calls
        ),
        semconv.CANARY_REWARDED_NS: _rewarded_ns(spans),
    }


def unproved_call(rollout_id: str, call: Span) -> Unproved | None:
    """Whether a call with an answer was answered by another version than expected, or by one that is not known."""
    expected, answered = call.text(semconv.CANARY_VERSION), call.text(semconv.POLICY_VERSION)
    if call.status == "error" or expected is None or answered == expected:
        return None
    return Unproved(rollout_id, call.span_id, expected, answered or "a model that the engine did not name")


def _sample(rollout_id: str, spans: Sequence[Span], found: Mapping[str, Any], canary: Canary) -> Sample:
    """`found` is `measured`, now or earlier."""
    trajectory = build_trajectory(spans)
    began = found[semconv.CANARY_BEGAN_NS]
    sample = Sample(
        rollout_id=rollout_id,
        key=found[semconv.CANARY_KEY],
        is_candidate=found[semconv.CANARY_ARM] == CANDIDATE,
        fraction=canary.fraction_at(began),
        day=datetime.fromtimestamp(began / 1e9, UTC).date().isoformat(),
        ended_ns=found[semconv.CANARY_ENDED_NS],
        latency_s=found[semconv.CANARY_LATENCY_NS] / 1e9,
        failed=found[semconv.CANARY_FAILED] or trajectory.error is not None,
    )
    if trajectory.reward is None:
        return sample
    reward = scaled(trajectory.reward, rollout_id, canary)
    return replace(sample, reward=reward, rewarded_ns=found[semconv.CANARY_REWARDED_NS] or _rewarded_ns(spans))


def scaled(reward: float, rollout_id: str, canary: Canary) -> float:
    """`reward` in [0, 1]. Raises CanaryError for one outside of the range in the settings."""
    low, high = canary.settings.lowest_reward, canary.settings.highest_reward
    if not low <= reward <= high:
        raise CanaryError(
            f"rollout {rollout_id} has the reward {reward:g}, and the canary expects {low:g} to {high:g}: the evidence "
            "would not hold; roll back, and start again with canary.lowest_reward and canary.highest_reward set"
        )
    return (reward - low) / (high - low)


def _rewarded_ns(spans: Iterable[Span]) -> int:
    """When the rollout as a whole got its last reward; 0 if it has none."""
    rewards = ((span.start_ns, read_reward(span)) for span in spans)
    found = (start_ns for start_ns, reward in rewards if reward and last_reward([reward], None) is not None)
    return max(found, default=0)
