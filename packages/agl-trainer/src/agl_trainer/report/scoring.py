"""Scores of an evaluation: rewards of rollouts, their parts, the rewards of roles, and pass@k."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from agl.errors import ConfigError, TrainingError
from agl.trajectory import Trajectory
from agl_trainer.report.evaluation import Answers, TaskScore
from agl_trainer.rollout.runner import Outcome


@dataclass(frozen=True, slots=True)
class Sampling:
    """Number of rollouts per task, and the criterion of success."""

    samples: int = 1
    pass_at: tuple[int, ...] = ()
    """The k of pass@k."""
    success: float = 1.0
    """Minimum reward of a rollout that solves its task."""

    def check(self, temperature: float) -> None:
        """Raises ConfigError if the numbers contradict each other or the sampling temperature."""
        if self.samples < 1:
            raise ConfigError(f"expected 1 sample of each task or more, got {self.samples}")
        if self.samples > 1 and temperature == 0:
            raise ConfigError(
                f"{self.samples} samples of each task are the same at temperature 0; set train.eval_temperature"
            )
        if wrong := [k for k in self.pass_at if not 1 <= k <= self.samples]:
            raise ConfigError(f"pass@{wrong[0]} needs {wrong[0]} samples of each task or more, got {self.samples}")


def rollout_score(outcome: Outcome, trajectory: Trajectory | None) -> TaskScore | None:
    """Reward and parts of a rollout; None if it failed. Rewards of roles are parts `<role>` and `<role>/<part>`.

    Raises TrainingError if the rollout succeeded without a reward.
    """
    if outcome.error is not None:
        return None
    reward, parts = outcome.reward, dict(outcome.parts)
    if trajectory is not None:
        whole = [found for found in trajectory.rewards if found.target is None and found.role is None]
        if reward is None and whole:
            reward, parts = whole[-1].value, dict(whole[-1].dimensions)
        parts |= _role_rewards(trajectory)
    if reward is None:
        raise TrainingError(
            f"rollout {outcome.rollout_id} ended without a reward; set train.reward or call agl.emit_reward"
        )
    return TaskScore(reward, parts)


def commonest_answers(trajectories: Iterable[Trajectory]) -> dict[str, Answers]:
    """By role: how many of its last answers, one of each rollout, are the commonest one."""
    found: dict[str, Counter[bytes]] = {}
    for trajectory in trajectories:
        last = {call.role: call.packed_response for call in trajectory.calls if call.packed_response is not None}
        for role, answer in last.items():
            found.setdefault(role, Counter())[answer] += 1
    return {role: Answers(counts.total(), max(counts.values())) for role, counts in found.items()}


def task_score(scores: Sequence[TaskScore | None], parts: Iterable[str], sampling: Sampling) -> TaskScore:
    """Means over the rollouts of a task, and its pass@k. A failed rollout counts as 0, also in each of `parts`.

    A part that only some rollouts have is averaged over these.
    """
    all_scores = [score or TaskScore(0.0, dict.fromkeys(parts, 0.0), failed=1) for score in scores]
    names = dict.fromkeys(name for score in all_scores for name in score.parts)
    means = {name: _mean([score.parts[name] for score in all_scores if name in score.parts]) for name in names}
    solved = sum(score is not None and score.reward >= sampling.success for score in scores)
    passes = {f"pass@{k}": pass_at_k(len(all_scores), solved, k) for k in sampling.pass_at}
    failed = sum(score.failed for score in all_scores)
    return TaskScore(_mean([score.reward for score in all_scores]), means | passes, failed)


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """Probability that `k` of `samples`, drawn without replacement, contain a solved one: 1 - C(n - c, k) / C(n, k).

    An unbiased estimate of the probability that k new samples contain a solution (arXiv 2107.03374, eq. 1).
    """
    return 1 - math.comb(samples - solved, k) / math.comb(samples, k)


def _role_rewards(trajectory: Trajectory) -> Mapping[str, float]:
    found: dict[str, float] = {}
    for reward in trajectory.rewards:
        if reward.target is None and reward.role is not None:
            found[reward.role] = reward.value
            found |= {f"{reward.role}/{name}": value for name, value in reward.dimensions.items()}
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
