"""Rejection sampling: train by likelihood on the rollouts that are good enough, and on no other.

Rejection-sampling fine-tuning (arXiv 2308.01825) keeps what reaches a reward; RAFT (arXiv 2304.06767) keeps the best of
the samples of each task. As in GRPO a rollout is judged for each role by what the role earned in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rejection:
    """Which rollouts are kept."""

    min_reward: float | None = None
    """Those that earned so much; None: the best of each group, the first of equals, where not all earned the same."""

    def kept(self, credits: Sequence[float], group_ids: Sequence[str]) -> list[bool]:
        """For each rollout, which earned `credits` in the group `group_ids`, whether it trains."""
        if self.min_reward is not None:
            return [credit >= self.min_reward for credit in credits]
        groups: dict[str, list[int]] = {}
        for place, group in enumerate(group_ids):
            groups.setdefault(group, []).append(place)
        best = {
            max(places, key=lambda place: credits[place])
            for places in groups.values()
            if len({credits[place] for place in places}) > 1
        }
        return [place in best for place in range(len(credits))]
