"""The score of a task in an evaluation: the rewards of its rollouts, their parts, each role's own, and pass@k."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from agl.errors import ConfigError, TrainingError
from agl.trajectory import Trajectory
from agl_trainer.report.evaluation import TaskScore
from agl_trainer.rollout.runner import Outcome


@dataclass(frozen=True, slots=True)
class Sampling:
    """How often each task is tried, and what counts as solved."""

    samples: int = 1
    pass_at: tuple[int, ...] = ()
    """The k of pass@k."""
    success: float = 1.0
    """A rollout with at least this reward has solved its task."""

    def check(self, temperature: float) -> None:
        """Raises ConfigError for numbers that mean nothing at this sampling temperature."""
        if self.samples > 1 and temperature == 0:
            raise ConfigError(
                f"{self.samples} samples of each task are the same at temperature 0; set train.eval_temperature"
            )
        if wrong := [k for k in self.pass_at if not 1 <= k <= self.samples]:
            raise ConfigError(f"pass@{wrong[0]} needs {wrong[0]} samples of each task or more, got {self.samples}")


def rollout_score(outcome: Outcome, trajectory: Trajectory | None) -> TaskScore | None:
    """What a rollout earned; None for one that failed. A role's own rewards are parts, `<role>` and `<role>/<part>`.

    Raises TrainingError for a rollout that ended well without a reward.
    """
    if outcome.error is not None:
        return None
    reward, parts = outcome.reward, dict(outcome.parts)
    if trajectory is not None:
        whole = [given for given in trajectory.rewards if given.target is None and given.role is None]
        if reward is None and whole:
            reward, parts = whole[-1].value, dict(whole[-1].dimensions)
        parts |= _of_roles(trajectory)
    if reward is None:
        raise TrainingError(
            f"rollout {outcome.rollout_id} ended without a reward; set train.reward or call agl.emit_reward"
        )
    return TaskScore(reward, parts)


def task_score(scores: Sequence[TaskScore | None], parts: Iterable[str], sampling: Sampling) -> TaskScore:
    """Means over the rollouts of a task, and its pass@k. A rollout that failed counts 0, also in each of `parts`.

    A part that only some of the others have is a mean over these.
    """
    made = [score or TaskScore(0.0, dict.fromkeys(parts, 0.0), failed=1) for score in scores]
    names = dict.fromkeys(name for score in made for name in score.parts)
    means = {name: _mean([score.parts[name] for score in made if name in score.parts]) for name in names}
    solved = sum(score is not None and score.reward >= sampling.success for score in scores)
    passes = {f"pass@{k}": pass_at_k(len(made), solved, k) for k in sampling.pass_at}
    failed = sum(score.failed for score in made)
    return TaskScore(_mean([score.reward for score in made]), means | passes, failed)


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """Probability that of `k` of the `samples` at least one is among the `solved`: 1 - C(n - c, k) / C(n, k).

    Unbiased for the probability that k fresh samples hold a solution (arXiv 2107.03374, eq. 1).
    """
    return 1 - math.comb(samples - solved, k) / math.comb(samples, k)


def _of_roles(trajectory: Trajectory) -> Mapping[str, float]:
    found: dict[str, float] = {}
    for reward in trajectory.rewards:
        if reward.target is None and reward.role is not None:
            found[reward.role] = reward.value
            found |= {f"{reward.role}/{name}": value for name, value in reward.dimensions.items()}
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
