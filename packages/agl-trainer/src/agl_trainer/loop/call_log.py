"""The outcome of every call of a training, recorded in the store and counted in the metrics."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from agl.store import Store
from agl.trajectory import DropReason, Reward, Trajectory, build_trajectory, late_rewards, trained_span
from agl_trainer.algo.batch import CallOutcome
from agl_trainer.algo.credit import Weights
from agl_trainer.rollout.rollouts import first_name

logger = logging.getLogger(__name__)

_MAX_NAMED = 3
"""Maximum number of rollout ids in a warning."""
_REWARDED = {
    None,
    DropReason.ZERO_ADVANTAGE,
    DropReason.REJECTED,
    DropReason.STALE,
    DropReason.TRUNCATED,
    DropReason.TOO_LONG,
    DropReason.SKIPPED_STEP,
}
"""Outcomes that imply that a reward reached the call."""


@dataclass(slots=True)
class CallLog:
    """Writes call outcomes to `store`, as spans next to the calls.

    An agent that timed out may continue to call; the next step finds such calls and counts them as late.
    """

    store: Store
    run: str
    """Name of the training."""
    _counted: dict[str, set[str]] = field(default_factory=dict)
    """Rollouts whose agents may still call, and the span ids of their calls that are counted already."""
    _without_reward: Sequence[str] = ()
    """Rollouts of the last step that had no reward."""

    def late_calls(self) -> list[CallOutcome]:
        """Outcomes of calls that arrived after their step had counted the rollout; every call is found once."""
        outcomes = []
        for rollout_id, spans in self.store.read_spans([*self._counted]):
            if spans:
                counted = self._counted[rollout_id]
                late = [call for call in build_trajectory(spans).calls if call.span_id not in counted]
                outcomes += [CallOutcome(call, None, DropReason.LATE) for call in late]
        self._counted = {}
        return outcomes

    def warn_of_late_rewards(self) -> None:
        """Log a warning if a reward has arrived of a rollout that the last step left out because it had none."""
        late = [name for name, spans in self.store.read_spans(self._without_reward) if late_rewards(spans)]
        if late:
            logger.warning(
                "the rewards of %d rollouts (%s) arrived late, after the step had counted them: emit rewards before "
                "the agent returns, or train on these rollouts with `agl train --from-store`",
                len(late),
                _named(late),
            )

    def record(self, step: int, outcomes: Sequence[CallOutcome], unfinished: Iterable[str] = ()) -> None:
        """Write the outcomes of a step. `unfinished`: rollouts whose agents may still be running."""
        spans = [
            trained_span(one.call, step, one.advantage, one.reason, weight=one.weight, run=self.run, ratios=one.ratios)
            for one in outcomes
        ]
        self.store.append_spans(spans)
        self._without_reward = rollouts_without_reward(outcomes)
        self._counted = {rollout_id: set() for rollout_id in unfinished}
        for outcome in outcomes:
            if outcome.call.rollout_id in self._counted:
                self._counted[outcome.call.rollout_id].add(outcome.call.span_id)


def call_metrics(outcomes: Sequence[CallOutcome]) -> dict[str, float]:
    """`calls`, and the number of calls by outcome; these add up to `calls`."""
    reasons = Counter(outcome.reason for outcome in outcomes)
    trained = reasons.pop(None, 0)
    dropped = {f"calls/dropped/{reason}": float(number) for reason, number in reasons.items()}
    return {"calls": float(len(outcomes)), "calls/trained": float(trained)} | dropped


def rollouts_without_reward(outcomes: Sequence[CallOutcome]) -> list[str]:
    """The rollouts that are not in their groups because no reward reaches them."""
    rewarded = {outcome.call.rollout_id for outcome in outcomes if outcome.reason in _REWARDED}
    without = [outcome.call.rollout_id for outcome in outcomes if outcome.reason is DropReason.NO_REWARD]
    return [rollout_id for rollout_id in dict.fromkeys(without) if rollout_id not in rewarded]


def warn_of_missing_rewards(rollout_ids: Sequence[str], whole: str) -> None:
    """Log a warning with the rollouts, if any, that are left out of `whole` because no reward reaches them."""
    if rollout_ids:
        logger.warning(
            "no reward reaches %d rollouts (%s): they are left out of %s; set train.reward or call agl.emit_reward in "
            "the agent",
            len(rollout_ids),
            _named(rollout_ids),
            whole,
        )


def _named(rollout_ids: Sequence[str]) -> str:
    return ", ".join(rollout_ids[:_MAX_NAMED]) + (", ..." if len(rollout_ids) > _MAX_NAMED else "")


def warn_of_unused_weights(trajectories: Sequence[Trajectory], weights: Mapping[str, Weights]) -> None:
    """Log a warning for each role whose `weights` name no dimension of the rewards that reach the role."""
    for role, of_role in weights.items():
        rewards = [reward for trajectory in trajectories for reward in _reaching(role, trajectory)]
        emitted = {name for reward in rewards for name in reward.dimensions}
        if of_role and rewards and not emitted & of_role.keys():
            logger.warning(
                "role %s has weights for %s (agent_roles.<role>.rewards, or rewards), but the rewards that reach it in "
                "this step have %s; a dimension without a weight counts 0",
                role,
                ", ".join(sorted(of_role)),
                f"the dimensions {', '.join(sorted(emitted))}" if emitted else "no dimensions",
            )


def warn_of_shared_seeds(trajectories: Sequence[Trajectory]) -> None:
    """Log a warning if rollouts of a group got equal answers by equal seeds, which the gateway never gives them."""
    sharing: dict[tuple[str, int, bytes], set[str]] = {}
    for trajectory in trajectories:
        for call in trajectory.calls:
            if trajectory.group_id and call.seed is not None and call.packed_response is not None:
                key = (trajectory.group_id, call.seed, call.packed_response)
                sharing.setdefault(key, set()).add(first_name(trajectory.rollout_id))
    repeated = [key for key, rollouts in sharing.items() if len(rollouts) > 1]
    if repeated:
        groups = {trajectory.group_id for trajectory in trajectories}
        logger.warning(
            "in %d of %d groups, rollouts got equal answers because the request sets a seed (%d): a group learns only "
            "from answers that differ; leave `seed` out in the agent and in gateway.extra_body, and the gateway gives "
            "each call its own",
            len({group for group, _, _ in repeated}),
            len(groups),
            repeated[0][1],
        )


def _reaching(role: str, trajectory: Trajectory) -> Iterator[Reward]:
    yield from (one for one in trajectory.rewards if one.target is None and one.role in (None, role))
    yield from (one for call in trajectory.calls if call.role == role for one in call.rewards)
