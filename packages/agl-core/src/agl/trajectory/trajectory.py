"""From the spans of a rollout to training rows and an account of every call."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from agl import semconv
from agl.errors import TrajectoryError
from agl.span import Span
from agl.trajectory.call import Call, collect_calls, say_error
from agl.trajectory.clock import in_one_clock
from agl.trajectory.drop import Drop, find_drops
from agl.trajectory.reward import Reward, collect_rewards, last_reward
from agl.trajectory.row import Row, build_rows


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A rollout's last attempt as training data. Every call is either a turn of one row or a drop."""

    rollout_id: str
    attempt_id: str | None
    group_id: str | None
    mode: str
    error: str | None
    """What went wrong with the rollout as a whole."""
    calls: list[Call]
    """Those of all attempts, by start time."""
    rewards: list[Reward]
    """Those of the last attempt, by time."""
    rows: list[Row]
    drops: list[Drop]

    @property
    def reward(self) -> float | None:
        """The rollout's own scalar: the last reward with neither target nor role."""
        return last_reward(self.rewards, role=None)


def build_trajectory(spans: Iterable[Span]) -> Trajectory:
    """The trajectory of the rollout that `spans` tell of; where it has several attempts, of the last.

    Raises TrajectoryError for no spans or spans that name several rollouts.
    """
    told = in_one_clock([span for span in spans if span.name != semconv.SPAN_TRAINED])
    spans = sorted(told, key=lambda span: span.start_ns)
    rollout_id = _only_rollout(spans)
    attempt_id = _last_attempt(spans)
    calls = collect_calls(spans, rollout_id)
    current = _of_attempt(spans, attempt_id)
    rewards = collect_rewards(current)
    drops = find_drops(calls, attempt_id)
    dropped = {id(drop.call) for drop in drops}
    rows = build_rows([call for call in calls if id(call) not in dropped], rewards)
    return Trajectory(
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        group_id=_first_text(current, semconv.GROUP_ID),
        mode=_first_text(current, semconv.MODE) or "prod",
        error=next((say_error(span) for span in current if _is_failed_rollout(span)), None),
        calls=calls,
        rewards=rewards,
        rows=rows,
        drops=drops,
    )


def _only_rollout(spans: Sequence[Span]) -> str:
    if not spans:
        raise TrajectoryError("there are no spans, expected those of one rollout")
    named = sorted({name for span in spans if (name := span.named_rollout)})
    if len(named) > 1:
        raise TrajectoryError(f"the spans name {len(named)} rollouts ({', '.join(named[:3])}, ...), expected one")
    return named[0] if named else spans[0].trace_id


def _last_attempt(spans: Sequence[Span]) -> str | None:
    """By the number that ends an attempt id (`<rollout>-a2`), then by its first span: clocks of hosts differ."""
    found = dict.fromkeys(name for span in spans if (name := span.attempt_id))
    # max takes the first of equals, and the later attempt is wanted.
    return max(reversed(found), key=_attempt_number, default=None)


def _of_attempt(spans: Sequence[Span], attempt_id: str | None) -> list[Span]:
    """Spans that name the attempt, and those that name none but for another attempt that their trace is of.

    Spans of other instrumentations name none; the gateway's calls do, in the same trace or for the same answers.
    """
    named = {id(span): span.attempt_id for span in spans}
    of_answer = {span.response_id: named[id(span)] for span in spans if named[id(span)]}
    of_trace: dict[str, set[str | None]] = {}
    for span in spans:
        if attempt := named[id(span)] or of_answer.get(span.response_id or ""):
            of_trace.setdefault(span.trace_id, set()).add(attempt)
    return [
        span
        for span in spans
        if named[id(span)] == attempt_id
        or (named[id(span)] is None and attempt_id in of_trace.get(span.trace_id, {attempt_id}))
    ]


def _attempt_number(attempt_id: str) -> int:
    number = re.search(r"-a(\d+)$", attempt_id)
    return int(number[1]) if number else 0


def _first_text(spans: Iterable[Span], name: str) -> str | None:
    return next((text for span in spans if (text := span.text(name))), None)


def _is_failed_rollout(span: Span) -> bool:
    return span.name == semconv.SPAN_ROLLOUT and span.status == "error"
