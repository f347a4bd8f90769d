"""The engine and the runner that produce rollouts during a training."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from agl.config import LogprobsMode
from agl.runner.runner import Outcome
from agl.store import Rollout


class TrainingEngine(Protocol):
    """Samples the calls of rollouts while the policy trains: in this process, or on vLLM servers."""

    @property
    def tokens_sampled(self) -> int | None:
        """Tokens sampled since the engine was opened; None if the engine does not count them."""
        ...

    @property
    def logprobs_mode(self) -> LogprobsMode:
        """Which logprobs it records."""
        ...

    def make_live(self) -> None:
        """Answer later calls with the policy's current weights. Raises TrainingError if the engine cannot."""
        ...

    def running_rollouts(self) -> AbstractContextManager[None]:
        """Context in which rollouts run: the versions that they may have begun with stay available."""
        ...

    def paused(self) -> AbstractContextManager[None]:
        """Context in which the policy's weights may change: no call samples from them."""
        ...

    def revive(self) -> None:
        """Restart a dead engine; a running one is left as it is. Raises TrainingError if it cannot be restarted."""
        ...


class ShownProgress(Protocol):
    """Progress that the user sees; `report.progress.Progress` implements it."""

    def update(self, **changes: Any) -> None:
        """Change the named fields."""
        ...


class RolloutRunner(Protocol):
    """Runs agents: in threads of this process (`Runner`), or in other processes (`QueuedRunner`)."""

    def run(self, rollouts: Sequence[Rollout], *, on_done: Callable[[Outcome], None] = ...) -> list[Outcome]:
        """Outcomes in the same order, once all spans are in the store; `on_done` is called as each ends.

        Any exception cancels the rollouts that have not ended.
        """
        ...


@dataclass(frozen=True, slots=True)
class Serving:
    """Engine and runner of a training."""

    engine: TrainingEngine
    runner: RolloutRunner
