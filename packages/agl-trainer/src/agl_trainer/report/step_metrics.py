"""Metrics of a GRPO step: rewards, lengths, staleness, tokens and time."""

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence

from agl.trajectory import Call, Trajectory
from agl_trainer.algo.batch import CallOutcome, GrpoBatch, version_number
from agl_trainer.algo.options import RoleState
from agl_trainer.compute.optimizer_step import StepStats
from agl_trainer.report.scoring import commonest_answers


class Stopwatch:
    """Measures the parts of a step."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self.laps: dict[str, float] = {}
        """Seconds by part."""

    def lap(self, name: str) -> None:
        """Add the time since the last lap to `name`."""
        now = time.monotonic()
        self.laps[name] = self.laps.get(name, 0.0) + max(now - self._since, 1e-9)
        self._since = now

    def metrics(self) -> dict[str, float]:
        return {f"time/{name}_s": seconds for name, seconds in self.laps.items()}


def reward_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Mean and standard deviation of the final reward of each rollout and of each role, and of their parts; number of
    rewards without a call."""
    values: dict[str, list[float]] = {}
    for trajectory in trajectories:
        last = {reward.role: reward for reward in trajectory.rewards if reward.target is None}
        for role, reward in last.items():
            prefix = "reward" if role is None else f"{role}/reward"
            values.setdefault(f"{prefix}/mean", []).append(reward.value)
            for part, value in reward.dimensions.items():
                values.setdefault(f"{prefix}/{part}", []).append(value)
    means = {name: statistics.fmean(found) for name, found in values.items()}
    without_call = sum(len(trajectory.rewards_without_call) for trajectory in trajectories)
    means |= {_std_name(name): statistics.pstdev(found) for name, found in values.items()}
    return means | {"rewards/without_call": float(without_call)}


def answer_metrics(trajectories: Iterable[Trajectory]) -> dict[str, float]:
    """Per role: share of the commonest of its last answers in the rollouts."""
    return {f"{role}/same_answer": answers.share for role, answers in commonest_answers(trajectories).items()}


def batch_metrics(batch: GrpoBatch, roles: Mapping[str, RoleState]) -> dict[str, float]:
    """Per role: credit, lengths of calls, and staleness of the calls that train, in versions."""
    metrics: dict[str, float] = {}
    for role, credits in batch.credits.items():
        metrics[f"{role}/credit_mean"] = statistics.fmean(credits)
        metrics[f"{role}/credit_std"] = statistics.pstdev(credits)
    for role in dict.fromkeys(outcome.call.role for outcome in batch.outcomes):
        own = [outcome for outcome in batch.outcomes if outcome.call.role == role]
        metrics |= {f"{role}/{name}": value for name, value in _lengths(outcome.call for outcome in own).items()}
        version = roles[role].version if role in roles else None
        if version is not None and (staleness := _staleness(own, version)):
            metrics[f"{role}/staleness_mean"] = statistics.fmean(staleness)
            metrics[f"{role}/staleness_max"] = max(staleness)
    return metrics


def update_metrics(updates: Mapping[str, StepStats], seconds: float) -> dict[str, float]:
    """Metrics of the optimizer steps of the adapters, and the speed of the update, which took `seconds`."""
    metrics = {f"{owner}/{name}": value for owner, update in updates.items() for name, value in update.metrics.items()}
    distinct = sum(update.distinct_tokens for update in updates.values())
    total = sum(update.total_tokens for update in updates.values())
    tokens = {"distinct": float(distinct), "total": float(total), "trained_per_s": total / seconds}
    return metrics | {f"tokens/{name}": value for name, value in tokens.items()}


def _std_name(name: str) -> str:
    return f"{name.removesuffix('mean')}std" if name.endswith("reward/mean") else f"{name}_std"


def _lengths(calls: Iterable[Call]) -> dict[str, float]:
    known = [call for call in calls if call.input_tokens is not None and call.output_tokens is not None]
    if not known:
        return {}
    answers = [float(call.output_tokens or 0) for call in known]
    return {
        "prompt_tokens_mean": statistics.fmean(call.input_tokens or 0 for call in known),
        "response_tokens_mean": statistics.fmean(answers),
        "response_tokens_min": min(answers),
        "response_tokens_max": max(answers),
        "truncated": statistics.fmean(call.finish_reason == "length" for call in known),
    }


def _staleness(outcomes: Iterable[CallOutcome], version: int) -> list[float]:
    numbers = [version_number(outcome.call.policy_version) for outcome in outcomes if outcome.reason is None]
    # Rollouts read from a store may have a higher version, of another training: they are skipped.
    return [float(version - number) for number in numbers if number is not None and number <= version]
