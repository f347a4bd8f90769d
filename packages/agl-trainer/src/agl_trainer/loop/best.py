"""The best evaluation of a phase so far."""

from dataclasses import dataclass, replace
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Best:
    """The step with the highest mean reward on the held-out tasks."""

    step: int
    reward: float
    waited: int = 0
    """Evaluations since then."""

    @classmethod
    def of(cls, data: dict[str, Any] | None) -> Self | None:
        """From the fields in a checkpoint."""
        return cls(**data) if data else None


def next_best(best: Best | None, step: int, reward: float) -> Best:
    """`best` after the evaluation of `step`; the earlier one of equals."""
    if best is None or reward > best.reward:
        return Best(step, reward)
    return replace(best, waited=best.waited + 1)
