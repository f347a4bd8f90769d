"""Builds a trajectory from the spans of a rollout: training rows, and a reason for each call that is in none."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from agl import semconv
from agl.errors import TrajectoryError
from agl.span import Span
from agl.trajectory.call import Call, error_of, read_call
from agl.trajectory.drop import Drop, find_drops
from agl.trajectory.join import CallSpans, SpanTree, in_one_clock, join_calls
from agl.trajectory.reward import Reward, by_target, last_reward, read_reward
from agl.trajectory.row import Row, build_rows
from agl.trajectory.sampled import Sampled, read_sampled


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A rollout's last attempt as training data. Every call is either a turn of one row or a drop."""

    rollout_id: str
    attempt_id: str | None
    group_id: str | None
    mode: str
    error: str | None
    """The error of the rollout as a whole."""
    calls: list[Call]
    """Calls of all attempts, by start time."""
    rewards: list[Reward]
    """Rewards of the last attempt, by time."""
    rows: list[Row]
    drops: list[Drop]
    sampled: Sampled | None = None
    """The decision of sampling. A rollout that it left out has its rewards and no calls."""
    missing_reward: str | None = None
    """Why the reward function gave no reward, if it did not."""

    @property
    def reward(self) -> float | None:
        """The rollout's scalar reward: the last one with neither target nor role."""
        return last_reward(self.rewards, role=None)

    @property
    def inclusion(self) -> float:
        """Probability with which a rollout like this one is kept."""
        return self.sampled.decision.probability if self.sampled else 1.0

    @property
    def failed_by_agent(self) -> bool:
        """The rollout failed, and not because the engine failed a call of the last attempt."""
        last = (call for call in self.calls if call.attempt_id in (None, self.attempt_id))
        return self.error is not None and not any(call.engine_failed for call in last)

    @property
    def rewards_without_call(self) -> list[Reward]:
        """Rewards whose target is no call of the rollout: they have no effect."""
        reached = {reward.target for call in self.calls for reward in call.rewards}
        return [reward for reward in self.rewards if reward.target and reward.target not in reached]


def build_trajectory(spans: Iterable[Span]) -> Trajectory:
    """The trajectory of the rollout of `spans`; if it has several attempts, of the last.

    Raises TrajectoryError if there are no spans or if they name several rollouts.
    """
    spans = list(spans)
    sampled = read_sampled(spans)
    if sampled is not None and not sampled.decision.kept:
        return _left_out(spans, sampled)
    tree = SpanTree(in_one_clock([span for span in spans if span.name not in semconv.NOT_IN_TREE]))
    joined = join_calls(tree)
    rollout_id = _only_rollout(tree.spans)
    attempt_id = _last_attempt(tree.spans, rollout_id)
    current = _of_attempt(tree.spans, joined, attempt_id)
    rewards = {id(span): reward for span in tree.spans if (reward := read_reward(span))}
    targets = by_target(rewards.values())
    calls = [read_call(tree, spans_of_call, rollout_id, targets) for spans_of_call in joined]
    current_rewards = [rewards[id(span)] for span in current if id(span) in rewards]
    damaged = sum(span.name == semconv.SPAN_DAMAGED for span in tree.spans)
    drops = find_drops(calls, attempt_id, damaged)
    dropped = {id(drop.call) for drop in drops}
    return Trajectory(
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        group_id=_first_text(current, semconv.GROUP_ID),
        mode=_first_text(current, semconv.MODE) or "prod",
        error=next((error_of(span) for span in current if _is_failed_rollout(span)), None),
        calls=calls,
        rewards=current_rewards,
        rows=build_rows([call for call in calls if id(call) not in dropped], current_rewards),
        drops=drops,
        sampled=sampled,
        missing_reward=_first_text(current, semconv.REWARD_MISSING),
    )


def _left_out(spans: Sequence[Span], sampled: Sampled) -> Trajectory:
    rewards = [sampled.reward] if sampled.reward else []
    named = (_only_rollout(spans), None, sampled.group_id, sampled.mode, sampled.error)
    return Trajectory(*named, calls=[], rewards=rewards, rows=[], drops=[], sampled=sampled)


def _only_rollout(spans: Sequence[Span]) -> str:
    if not spans:
        raise TrajectoryError("there are no spans, expected those of one rollout")
    named = sorted({name for span in spans if (name := span.named_rollout)})
    if len(named) > 1:
        raise TrajectoryError(f"the spans name {len(named)} rollouts ({', '.join(named[:3])}, ...), expected one")
    return named[0] if named else spans[0].trace_id


def _last_attempt(spans: Sequence[Span], rollout_id: str) -> str | None:
    """The last attempt to start; by number, where a store numbered all of them (`<rollout_id>-a2`).

    Other ids have no order in them, whatever digits they contain.
    """
    found = dict.fromkeys(name for span in spans if (name := span.attempt_id))
    numbers = {name: name.removeprefix(f"{rollout_id}-a") for name in found}
    if all(name != number and number.isdecimal() for name, number in numbers.items()):
        return max(found, key=lambda name: int(numbers[name]), default=None)
    return [*found][-1]


def _of_attempt(spans: Sequence[Span], joined: Sequence[CallSpans], attempt_id: str | None) -> list[Span]:
    """Spans that name the attempt, and spans that name none unless their trace belongs to another attempt.

    A trace belongs to the attempts that its spans, or the spans that they are joined with, name: spans of other
    instrumentations name no attempt, while the gateway's do.
    """
    attempts_of_trace: dict[str, set[str]] = {}
    for group in [*((span,) for span in spans), *(call.spans for call in joined)]:
        if attempt := next((name for span in group if (name := span.attempt_id)), None):
            for span in group:
                attempts_of_trace.setdefault(span.trace_id, set()).add(attempt)
    return [
        span
        for span in spans
        if (named := span.attempt_id) == attempt_id
        or (named is None and attempt_id in attempts_of_trace.get(span.trace_id, {attempt_id}))
    ]


def _first_text(spans: Iterable[Span], name: str) -> str | None:
    return next((text for span in spans if (text := span.text(name))), None)


def _is_failed_rollout(span: Span) -> bool:
    return span.name == semconv.SPAN_ROLLOUT and span.status == "error"
