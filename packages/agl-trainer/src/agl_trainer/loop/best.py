"""Which step's adapters did best on the held-out tasks, and how long ago that was."""

from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation of a phase so far."""

    step: int
    reward: float
    waited: int = 0
    """Evaluations since then, none of which was better."""

    @classmethod
    def of(cls, data: dict[str, Any] | None) -> Self | None:
        """What a checkpoint kept."""
        return cls(**data) if data else None


def next_best(best: Best | None, step: int, reward: float) -> Best:
    """`best` after the evaluation of `step`; of equals the earlier one stays."""
    if best is None or reward > best.reward:
        return Best(step, reward)
    return Best(best.step, best.reward, best.waited + 1)
