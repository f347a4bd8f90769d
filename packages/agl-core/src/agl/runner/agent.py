"""Calls the user's agent function for an attempt, and the reward function on its answer, inside `agl.rollout`."""

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
from agl.runner.agent_loop import AgentLoop
from agl.runner.log_events import logs_recorded
from agl.store import Attempt, Rollout

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class AgentRun:
    """A running attempt and its result. The thread that runs it fills in the result."""

    rollout: Rollout
    attempt: Attempt
    limit_s: float
    """Time that the attempt may take."""
    deadline: float
    """On the clock of `time.monotonic`, in seconds."""
    answer: Any = None
    reward: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    awaited: Future[Any] | None = None
    """Future of an async agent (or reward function) that the thread waits for."""
    abandoned: bool = False

    def abandon(self) -> None:
        """Discard the run's result and cancel its coroutine. A thread cannot be cancelled and may go on running."""
        self.abandoned = True
        if self.awaited is not None:
            self.awaited.cancel()


class Agent:
    """The agent `function` and the `reward` function, each sync or async.

    `function` receives the task. `reward` receives the task and the answer and returns a number or
    `{dimension: number}`, combined by `agl.emit.reward.weighted_sum` with `weights`. If `reward` is None, the agent
    emits its rewards itself.
    """

    def __init__(
        self, function: Callable[[Any], Any], reward: Callable[[Any, Any], Any] | None, weights: Mapping[str, float]
    ) -> None:
        self._function = function
        self._reward = reward
        self._weights = weights
        self._loop = AgentLoop()

    def execute(self, run: AgentRun) -> None:
        """Call the function in the calling thread, inside `agl.rollout`. Never raises: an error is kept in `run`."""
        rollout = run.rollout
        current = agl.rollout(
            rollout.rollout_id,
            group_id=rollout.group_id,
            attempt_id=run.attempt.attempt_id,
            mode=cast(Mode, rollout.mode),
        )
        try:
            with current, logs_recorded():
                run.answer = self._resolve(run, self._function(rollout.input))
                if self._reward is not None and not run.abandoned:
                    self._score(run, self._reward)
        except BaseException as error:  # noqa: BLE001 - any failure of the agent, sys.exit included, ends the attempt only
            run.error = _describe(error)

    def renew_blocked_loop(self) -> None:
        """Start a new event loop for later runs if an async agent blocks the current one."""
        if self._loop.is_blocked():
            logger.warning("an async agent blocks its event loop (a call without await); starting another loop")
            self._loop = AgentLoop()

    def close(self) -> None:
        self._loop.close()

    def _score(self, run: AgentRun, reward: Callable[[Any, Any], Any]) -> None:
        try:
            score = self._resolve(run, reward(run.rollout.input, run.answer))
            attributes = reward_attributes(score, weights=self._weights)
        except Exception as error:  # the reward function is the user's: any error of it must name it
            raise AgentError(f"the reward function failed: {_describe(error)}") from error
        run.reward = float(attributes.pop(semconv.REWARD_VALUE))
        run.parts = {name.removeprefix(semconv.REWARD_PREFIX): float(part) for name, part in attributes.items()}
        agl.emit_reward(run.reward, attributes=attributes)

    def _resolve(self, run: AgentRun, result: Any) -> Any:
        """`result`, or the value of an awaitable `result`, which runs on the agents' event loop."""
        if not inspect.isawaitable(result):
            return result
        run.awaited = self._loop.submit(result)
        return run.awaited.result()


def _describe(error: BaseException) -> str:
    """Type and message of `error`; the rollout's span has its traceback."""
    return traceback.format_exception_only(error)[-1].strip()
