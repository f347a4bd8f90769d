"""The rollouts of a canary, read from their spans: their arm, what they earned, and which version answered them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from agl import semconv
from agl.canary.history import Canary
from agl.canary.table import Sample
from agl.errors import CanaryError
from agl.span import Span
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
    for rollout_id in store.rollout_ids():
        spans = store.query_spans(rollout_id)
        calls = [span for span in spans if _is_of(canary, span)]
        if calls:
            samples.append(_sample(rollout_id, spans, calls, canary))
            unproved += [found for call in calls if (found := unproved_call(rollout_id, call))]
    arms: dict[str, set[bool]] = {}
    for sample in samples:
        arms.setdefault(sample.key, set()).add(sample.is_candidate)
    kept = [sample for sample in samples if len(arms[sample.key]) == 1]
    return Observed(sorted(kept, key=lambda sample: sample.ended_ns), len(samples) - len(kept), unproved)


def _is_of(canary: Canary, span: Span) -> bool:
    """Whether `span` is a call that the canary gave to the candidate or the current version of one of its roles."""
    return span.text(semconv.CANARY_ID) == canary.id and span.text(semconv.CANARY_VERSION) is not None


def unproved_call(rollout_id: str, call: Span) -> Unproved | None:
    """Whether a call with an answer was answered by another version than expected, or by one that is not known."""
    expected, answered = call.text(semconv.CANARY_VERSION), call.text(semconv.POLICY_VERSION)
    if call.status == "error" or expected is None or answered == expected:
        return None
    return Unproved(rollout_id, call.span_id, expected, answered or "a model that the engine did not name")


def _sample(rollout_id: str, spans: Sequence[Span], calls: Sequence[Span], canary: Canary) -> Sample:
    trajectory = build_trajectory(spans)
    began, ended = min(call.start_ns for call in calls), max(call.end_ns for call in calls)
    root = next((span for span in spans if span.name == semconv.SPAN_ROLLOUT), None)
    latency_ns = root.end_ns - root.start_ns if root else ended - began
    failed_call = any(call.status == "error" and call.text(semconv.ERROR_TYPE) != _CLIENT_LEFT for call in calls)
    sample = Sample(
        rollout_id=rollout_id,
        key=calls[0].text(semconv.CANARY_KEY) or rollout_id,
        is_candidate=calls[0].text(semconv.CANARY_ARM) == CANDIDATE,
        fraction=canary.fraction_at(began),
        day=datetime.fromtimestamp(began / 1e9, UTC).date().isoformat(),
        ended_ns=ended,
        latency_s=latency_ns / 1e9,
        failed=failed_call or trajectory.error is not None,
    )
    if trajectory.reward is None:
        return sample
    reward = scaled(trajectory.reward, rollout_id, canary)
    return replace(sample, reward=reward, rewarded_ns=_rewarded_ns(spans))


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
    """When the rollout as a whole got its last reward."""
    rewards = ((span.start_ns, read_reward(span)) for span in spans)
    return max(start_ns for start_ns, reward in rewards if reward and last_reward([reward], None) is not None)
