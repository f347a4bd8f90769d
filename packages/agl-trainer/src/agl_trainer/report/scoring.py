"""Scores of an evaluation: rewards of rollouts, their parts, the rewards of roles, and pass@k."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from agl.errors import ConfigError
from agl.runner.runner import Outcome
from agl.trajectory import Trajectory
from agl_trainer.report.evaluation import Answers, TaskScore

_MANY_MISSING = 0.05


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
    """Reward and parts of a rollout; None if it has no reward, and 0 if it failed.

    Rewards of roles are parts `<role>` and `<role>/<part>`.
    """
    if outcome.error is not None:
        return TaskScore(0.0, failed=1)
    reward, parts = outcome.reward, dict(outcome.parts)
    if trajectory is not None:
        whole = [found for found in trajectory.rewards if found.target is None and found.role is None]
        if reward is None and whole:
            reward, parts = whole[-1].value, dict(whole[-1].dimensions)
        parts |= _role_rewards(trajectory)
    return None if reward is None else TaskScore(reward, parts)


def missing_rewards(outcomes: Iterable[Outcome], trajectories: Iterable[Trajectory]) -> dict[str, str]:
    """Rollout to why the reward function gave it none: as its runner says, else as recorded, e.g. elsewhere."""
    recorded = {one.rollout_id: one.missing_reward for one in trajectories if one.missing_reward is not None}
    return recorded | {one.rollout_id: one.missing for one in outcomes if one.missing is not None}


def describe_missing(missing: Mapping[str, str], answered: int) -> str | None:
    """A line with the number of rewards that are `missing` of `answered` rollouts, and the commonest reason."""
    reasons = Counter(missing.values())
    if not reasons:
        return None
    (reason, count), *_ = reasons.most_common(1)
    line = f"{reasons.total()} of {answered} rewards are missing, {count} of them with: {reason}"
    if reasons.total() <= _MANY_MISSING * answered:
        return line
    return f"{line}. More than 5 % are missing, perhaps those of the hardest answers: look at the reward function"


def commonest_answers(trajectories: Iterable[Trajectory]) -> dict[str, Answers]:
    """By role: how many of its last answers, one of each rollout, are the commonest one."""
    found: dict[str, Counter[bytes]] = {}
    for trajectory in trajectories:
        last = {call.role: call.packed_response for call in trajectory.calls if call.packed_response is not None}
        for role, answer in last.items():
            found.setdefault(role, Counter())[answer] += 1
    return {role: Answers(counts.total(), max(counts.values())) for role, counts in found.items()}


def task_score(scores: Sequence[TaskScore], parts: Iterable[str], sampling: Sampling) -> TaskScore:
    """Means over the rollouts of a task, at least one, and its pass@k if there are k of them.

    A failed rollout counts as 0, also in each of `parts`. A part that only some rollouts have is averaged over these.
    """
    zeros = dict.fromkeys(parts, 0.0)
    parts_of_each = [zeros if score.failed else score.parts for score in scores]
    names = dict.fromkeys(name for each in parts_of_each for name in each)
    means = {name: _mean([each[name] for each in parts_of_each if name in each]) for name in names}
    solved = sum(not score.failed and score.reward >= sampling.success for score in scores)
    passes = {f"pass@{k}": pass_at_k(len(scores), solved, k) for k in sampling.pass_at if k <= len(scores)}
    failed = sum(score.failed for score in scores)
    return TaskScore(_mean([score.reward for score in scores]), means | passes, failed)


def task_scores(names: Sequence[str], scores: Sequence[TaskScore | None], sampling: Sampling) -> dict[str, TaskScore]:
    """The scores of the tasks `names` from those of their rollouts, task after task; without tasks that have none."""
    parts = list(dict.fromkeys(part for score in scores if score for part in score.parts))
    found: dict[str, TaskScore] = {}
    for index, name in enumerate(names):
        of_task = scores[index * sampling.samples : (index + 1) * sampling.samples]
        if rewarded := [score for score in of_task if score is not None]:
            found[name] = task_score(rewarded, parts, sampling)
    return found


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
