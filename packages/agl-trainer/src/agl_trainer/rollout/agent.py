"""The user's agent function, called once for each attempt, with its answer scored inside the rollout."""

import inspect
import logging
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, cast

import agl
from agl import semconv
from agl.context import Mode
from agl.emit.reward import reward_attributes
from agl.errors import AgentError
from agl.store import Attempt, Rollout
from agl_trainer.rollout.agent_loop import AgentLoop

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class AgentRun:
    """An attempt under way, and what came of it. Filled in by the thread that runs it."""

    rollout: Rollout
    attempt: Attempt
    deadline: float
    """On `time.monotonic`."""
    answer: Any = None
    reward: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    awaited: Future[Any] | None = None
    """What the thread waits for, where the agent is async."""
    abandoned: bool = False

    def abandon(self) -> None:
        """Cancel what can be cancelled. A thread cannot: it may go on, but nothing of it counts any more."""
        self.abandoned = True
        if self.awaited is not None:
            self.awaited.cancel()


class Agent:
    """`function` (sync or async; it receives the task) and the reward of its answers.

    `reward` (sync or async) is called with the task and the answer and returns a number or `{dimension: number}`,
    weighed by `weights` as `agl.emit.reward.weighted_sum` says; None: the agent emits its rewards itself.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        reward: Callable[[Any, Any], Any] | None,
        weights: Mapping[str, float],
    ) -> None:
        self._function = function
        self._reward = reward
        self._weights = weights
        self._loop = AgentLoop()

    def execute(self, run: AgentRun) -> None:
        """Call the function in the calling thread, inside `agl.rollout`; never raises: an error stands in `run`."""
        rollout = run.rollout
        try:
            with agl.rollout(
                rollout.rollout_id,
                group_id=rollout.group_id,
                attempt_id=run.attempt.attempt_id,
                mode=cast(Mode, rollout.mode),
            ):
                run.answer = self._finish(run, self._function(rollout.input))
                if self._reward is not None and not run.abandoned:
                    self._score(run, self._reward)
        except BaseException as error:  # noqa: BLE001 - whatever an agent does, sys.exit included, is data
            run.error = _say(error)

    def renew_blocked_loop(self) -> None:
        """Give later runs a new event loop where an async agent blocks the present one."""
        if self._loop.is_blocked():
            logger.warning("an async agent blocks its event loop (a call without await); starting another loop")
            self._loop = AgentLoop()

    def close(self) -> None:
        self._loop.close()

    def _score(self, run: AgentRun, reward: Callable[[Any, Any], Any]) -> None:
        try:
            score = self._finish(run, reward(run.rollout.input, run.answer))
            attributes = reward_attributes(score, weights=self._weights)
        except Exception as error:  # the reward function is the user's: whatever it raises is named as its own
            raise AgentError(f"the reward function failed: {_say(error)}") from error
        run.reward = float(attributes.pop(semconv.REWARD_VALUE))
        run.parts = {name.removeprefix(semconv.REWARD_PREFIX): float(part) for name, part in attributes.items()}
        agl.emit_reward(run.reward, attributes=attributes)

    def _finish(self, run: AgentRun, result: Any) -> Any:
        """`result`, awaited on the agents' loop where it is awaitable."""
        if not inspect.isawaitable(result):
            return result
        run.awaited = self._loop.submit(result)
        return run.awaited.result()


def _say(error: BaseException) -> str:
    """Type and message of `error`; its traceback stands in the rollout's span."""
    return traceback.format_exception_only(error)[-1].strip()
