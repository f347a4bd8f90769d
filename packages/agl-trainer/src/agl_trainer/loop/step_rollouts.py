"""The rollouts of a training step, drawn until enough groups have different rewards, and the batch built from them."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from agl.errors import NothingTrainedError
from agl.runner.runner import Outcome
from agl.trajectory import ADVICE, DropReason, Reward, Trajectory
from agl_trainer.algo.batch import GrpoBatch
from agl_trainer.algo.batch_builder import grpo_batch
from agl_trainer.algo.options import BatchOptions, RoleState
from agl_trainer.report.scoring import describe_missing, missing_rewards
from agl_trainer.report.step_metrics import Stopwatch
from agl_trainer.rollout.sources import RolloutBatch, RolloutSource

_MAX_REASONS = 2
"""Reasons that are named if no call trains."""


@dataclass(slots=True)
class StepRollouts:
    """Rollouts that a step drew, and the batch of them."""

    failed_reward: float | None = None
    """Reward of a rollout that failed by its agent; None: it is not in its group."""
    drawn: list[RolloutBatch] = field(default_factory=list)
    groups: int = 0
    """Groups drawn, including those that were replaced."""
    replaced: list[str] = field(default_factory=list)
    """Ids of the zero-variance groups that were replaced by new ones."""
    batch: GrpoBatch = field(default_factory=GrpoBatch)

    @property
    def outcomes(self) -> list[Outcome]:
        return [outcome for drawn in self.drawn for outcome in drawn.outcomes]

    @property
    def trajectories(self) -> list[Trajectory]:
        return [self._graded(trajectory) for drawn in self.drawn for trajectory in drawn.trajectories]

    @property
    def unfinished(self) -> list[str]:
        """Rollouts whose agents may still be running."""
        return [outcome.rollout_id for outcome in self.outcomes if outcome.error is not None]

    def check_calls(self) -> None:
        """Raises NothingTrainedError if rollouts succeeded without any known call."""
        succeeded = sum(outcome.error is None for outcome in self.outcomes)
        if succeeded and not self.batch.outcomes:
            raise NothingTrainedError(
                f"{succeeded} of {len(self.outcomes)} rollouts succeeded, but no model call was joined to any of them; "
                "name the framework in train.instrument, or send agl.headers() with each request to OPENAI_BASE_URL"
            )

    def many_failures(self) -> str | None:
        """A line with the commonest error, if more than a tenth of the rollouts failed."""
        errors = self._errors()
        failed = Counter(error for error in errors if error is not None)
        if 10 * failed.total() <= len(errors):
            return None
        (error, count), *_ = failed.most_common(1)
        return f"{failed.total()} of {len(errors)} rollouts failed, {count} of them with: {error}"

    def describe_missing(self) -> str | None:
        """A line about the rewards that the reward function did not give, if any."""
        answered = sum(error is None for error in self._errors())
        return describe_missing(missing_rewards(self.outcomes, self.trajectories), answered)

    def count_trained(self) -> int:
        return sum(outcome.reason is None for outcome in self.batch.outcomes)

    def earned_alike(self) -> bool:
        """Whether calls did not train for this reason most of all: the rollouts of their groups earned the same."""
        counts = Counter(outcome.reason for outcome in self.batch.outcomes)
        return [reason for reason, _ in counts.most_common(1)] == [DropReason.ZERO_ADVANTAGE]

    def why_none_trained(self) -> str:
        """The commonest reasons, with what to do."""
        failures, outcomes = self.many_failures(), self.batch.outcomes
        if not outcomes:
            return f"no call trained: {failures or 'there is none'}"
        found = {drop.reason: drop.detail for trajectory in self.trajectories for drop in trajectory.drops}
        details = {**ADVICE, **found} | ({DropReason.FAILED_ROLLOUT: failures} if failures else {})
        details |= {DropReason.NO_REWARD: missing} if (missing := self.describe_missing()) else {}
        counts = Counter(outcome.reason for outcome in outcomes if outcome.reason)
        reasons = [f"{number} {reason} ({details[reason]})" for reason, number in counts.most_common(_MAX_REASONS)]
        return f"none of {len(outcomes)} calls trained: {'; '.join(reasons)}"

    def metrics(self) -> dict[str, float]:
        errors = self._errors()
        return {
            "rollouts": float(len(errors)),
            "rollouts/failed": float(sum(error is not None for error in errors)),
            "rewards/missing": float(len(missing_rewards(self.outcomes, self.trajectories))),
            "groups": float(self.groups),
            "groups/replaced": float(len(self.replaced)),
            "groups/zero_variance": float(len(self.batch.zero_variance_groups)),
        } | _merge(drawn.metrics for drawn in self.drawn)

    def _errors(self) -> list[str | None]:
        """The error of each rollout, also of those that were run again."""
        read = [trajectory.error for drawn in self.drawn for trajectory in drawn.trajectories]
        return [outcome.error for outcome in self.outcomes] or read

    def _graded(self, trajectory: Trajectory) -> Trajectory:
        if self.failed_reward is None or not trajectory.failed_by_agent:
            return trajectory
        return replace(trajectory, error=None, rewards=[Reward(self.failed_reward, {}, None, None)])


def draw_rollouts(
    source: RolloutSource,
    step: int,
    position: int,
    groups: int,
    *,
    replacements: int,
    roles: Mapping[str, RoleState],
    options: BatchOptions,
    clock: Stopwatch,
    failed_reward: float | None = None,
) -> StepRollouts:
    """Draw `groups` groups after the first `position`, and replace zero-variance ones at most `replacements` times."""
    rollouts, missing = StepRollouts(failed_reward), groups
    for _ in range(1 + replacements):
        rollouts.replaced = list(rollouts.batch.zero_variance_groups)
        rollouts.drawn.append(source.draw(step, position, range(rollouts.groups, rollouts.groups + missing)))
        rollouts.groups += missing
        clock.lap("rollouts")
        rollouts.batch = grpo_batch(rollouts.trajectories, roles, options, replaced_groups=frozenset(rollouts.replaced))
        clock.lap("batch")
        missing = len(rollouts.batch.zero_variance_groups) - len(rollouts.replaced)
        if not missing:
            break
    return rollouts


def _merge(metrics: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of several draws: sums, but the mean of the judge's disagreement."""
    found: dict[str, list[float]] = {}
    for one in metrics:
        for name, value in one.items():
            found.setdefault(name, []).append(value)
    return {name: statistics.fmean(each) if name == "judge/disagreement" else sum(each) for name, each in found.items()}
