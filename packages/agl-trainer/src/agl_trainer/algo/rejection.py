"""Rejection sampling: fine-tune by likelihood on the rollouts with the best rewards only.

Rejection-sampling fine-tuning (arXiv 2308.01825) keeps the samples that reach a reward; RAFT (arXiv 2304.06767) keeps
the best samples of each task. As in GRPO, each role of a rollout is selected by its own credit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from agl_trainer.algo.advantages import group_members


@dataclass(frozen=True, slots=True)
class Rejection:
    """Which rollouts to keep."""

    min_reward: float | None = None
    """Minimum credit. None: the best rollout of each group, the first of equals; none if all earned the same."""

    def kept(self, credits: Sequence[float], group_ids: Sequence[str]) -> list[bool]:
        """Whether to train on each rollout, given its credit and its group."""
        if self.min_reward is not None:
            return [credit >= self.min_reward for credit in credits]
        groups = [members.tolist() for members in group_members(group_ids)]
        best = {
            max(indices, key=lambda index: credits[index])
            for indices in groups
            if len({credits[index] for index in indices}) > 1
        }
        return [index in best for index in range(len(credits))]
