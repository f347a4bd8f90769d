"""Runs rollouts in other processes: queues them in the store, and waits until runners have ended them."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from agl.runner.runner import Outcome
from agl.store import AttemptState, Rollout, RolloutState, Store

logger = logging.getLogger(__name__)

_WAIT_S: Final = 0.5
_MAX_ATTEMPTS: Final = 3
"""Attempts of a rollout whose runners die. One that fails by its agent is not tried again."""


@dataclass(frozen=True, slots=True)
class QueuedRunner:
    """The rollouts of a training whose agents run in `agl runner`. Thread-safe."""

    store: Store
    unresponsive_s: float
    check: Callable[[], None]
    """Raises RunnerError if the runners of this training cannot run."""
    how_to_start: str
    """The command that starts a runner."""
    warn_after_s: float = 30.0
    """Time without a runner after which a warning says so."""

    def run(
        self, rollouts: Sequence[Rollout], *, on_done: Callable[[Outcome], None] = lambda outcome: None
    ) -> list[Outcome]:
        """As `Runner.run`, but an outcome has no answer and no reward: these are on the spans in the store."""
        self.store.enqueue_rollouts([self._limited(rollout) for rollout in rollouts])
        left = list(dict.fromkeys(rollout.rollout_id for rollout in rollouts))
        outcomes: dict[str, Outcome] = {}
        warn_at = time.monotonic() + self.warn_after_s
        try:
            while left:
                found = self.store.wait_for_rollouts(left, _WAIT_S)
                for rollout in (rollout for rollout in found if rollout.state.is_over):
                    outcomes[rollout.rollout_id] = self._outcome(rollout)
                    on_done(outcomes[rollout.rollout_id])
                left = [rollout.rollout_id for rollout in found if not rollout.state.is_over]
                if left and time.monotonic() > warn_at and all(rollout.attempts == 0 for rollout in found):
                    logger.warning(
                        "no runner has taken any of %d rollouts; start one: %s", len(left), self.how_to_start
                    )
                    warn_at = time.monotonic() + 10 * self.warn_after_s
                self.check()
                self.store.end_overdue_attempts()
        except BaseException:
            self.store.cancel_rollouts(left)
            raise
        return [outcomes[rollout.rollout_id] for rollout in rollouts]

    def _limited(self, rollout: Rollout) -> Rollout:
        """Without a `timeout_s`: a runner has that of its configuration, and its silence is limited."""
        return replace(
            rollout,
            max_attempts=_MAX_ATTEMPTS,
            retry_on=frozenset({AttemptState.UNRESPONSIVE}),
            unresponsive_s=self.unresponsive_s,
        )

    def _outcome(self, rollout: Rollout) -> Outcome:
        if rollout.state is RolloutState.SUCCEEDED:
            return Outcome(rollout.rollout_id, rollout.state)
        attempts = self.store.query_attempts(rollout.rollout_id)
        error = attempts[-1].error if attempts else None
        return Outcome(rollout.rollout_id, rollout.state, error or f"it is {rollout.state}")
