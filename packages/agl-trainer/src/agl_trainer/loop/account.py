"""The account of a training: what each step did with every call of its rollouts, as spans and as counts."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from agl.store import Store
from agl.trajectory import DropReason, build_trajectory, trained_span
from agl_trainer.algo.batch import CallOutcome

logger = logging.getLogger(__name__)

_NAMED = 3
"""So many rollouts are named in a warning."""
_REWARDED = {
    None,
    DropReason.ZERO_ADVANTAGE,
    DropReason.REJECTED,
    DropReason.STALE,
    DropReason.TRUNCATED,
    DropReason.TOO_LONG,
    DropReason.SKIPPED_STEP,
}
"""What only a call can come to that a reward reached."""


@dataclass(slots=True)
class Account:
    """Keeps the outcomes of steps in `store`, beside the calls that they are on.

    An agent that ran out of time may go on calling: such calls are found in the next step and counted there.
    """

    store: Store
    run: str
    """Name of the training."""
    _counted: dict[str, set[str]] = field(default_factory=dict)
    """Rollouts that may still call, and the span ids of the calls of theirs that were counted."""

    def late_calls(self) -> list[CallOutcome]:
        """Verdicts on the calls that arrived after their step had counted the rollout; each is found once."""
        found = []
        for rollout_id, counted in self._counted.items():
            if spans := self.store.query_spans(rollout_id):
                late = [call for call in build_trajectory(spans).calls if call.span_id not in counted]
                found += [CallOutcome(call, None, DropReason.LATE) for call in late]
        self._counted = {}
        return found

    def record(self, step: int, outcomes: Sequence[CallOutcome], unfinished: Iterable[str] = ()) -> None:
        """Write the outcomes of a step. `unfinished`: rollouts whose agents may still run."""
        self.store.append_spans(
            [
                trained_span(made.call, step, made.advantage, made.reason, weight=made.weight, run=self.run)
                for made in outcomes
            ]
        )
        self._counted = {name: set() for name in unfinished}
        for outcome in outcomes:
            if outcome.call.rollout_id in self._counted:
                self._counted[outcome.call.rollout_id].add(outcome.call.span_id)


def call_metrics(outcomes: Sequence[CallOutcome]) -> dict[str, float]:
    """`calls`, and what they came to: the other counts add up to it."""
    reasons = Counter(outcome.reason for outcome in outcomes)
    trained = reasons.pop(None, 0)
    dropped = {f"calls/dropped/{reason}": float(number) for reason, number in reasons.items()}
    return {"calls": float(len(outcomes)), "calls/trained": float(trained)} | dropped


def warn_of_missing_rewards(outcomes: Sequence[CallOutcome]) -> int:
    """Say which rollouts are left out of their groups because no reward reaches any call; returns how many."""
    counted = {outcome.call.rollout_id for outcome in outcomes if outcome.reason in _REWARDED}
    left_out = [outcome.call.rollout_id for outcome in outcomes if outcome.reason is DropReason.NO_REWARD]
    missing = [rollout_id for rollout_id in dict.fromkeys(left_out) if rollout_id not in counted]
    if missing:
        named = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        logger.warning(
            "no reward reaches %d rollouts (%s): they are left out of their groups; set train.reward or call "
            "agl.emit_reward in the agent",
            len(missing),
            named,
        )
    return len(missing)
