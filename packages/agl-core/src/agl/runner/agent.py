"""Calls the user's agent function for an attempt, and the reward function on its answer, inside `agl.rollout`."""

import contextvars
import inspect
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, cast

from opentelemetry import trace

import agl
from agl import semconv
from agl.content.filter import ContentFilter, content_json
from agl.context import Mode
from agl.emit.reward import record_missing_reward
from agl.rewards import Score, read_score
from agl.rewards.score import call_scorer, describe_error
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
    """Time that the agent may take, and once more the reward function, unless the rollout has a limit of its own."""
    deadline: float = 0.0
    """On the clock of `time.monotonic`, in seconds."""
    answer: Any = None
    answered: bool = False
    """The agent has returned; the reward function may still run."""
    score: Score = field(default_factory=Score)
    error: str | None = None
    awaited: Future[Any] | None = None
    """Future of an async agent (or reward function) that the thread waits for."""
    abandoned: bool = False
    context: contextvars.Context = field(default_factory=contextvars.Context)
    """That of the rollout, once it has begun."""

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.limit_s

    def take_answer(self, answer: Any) -> None:
        """Keep the agent's answer, and give the reward function its time."""
        self.answer = answer
        if self.rollout.timeout_s is None:
            self.deadline = time.monotonic() + self.limit_s
        self.answered = True

    def miss_reward(self, reason: str) -> None:
        """Record that there is no reward, in place of the thread, whose reward function has not returned."""
        self.score = Score(None, missing=reason)
        self.context.run(record_missing_reward, reason)

    @property
    def is_late(self) -> bool:
        return self.deadline <= time.monotonic()

    def abandon(self) -> None:
        """Discard the run's result and cancel its coroutine. A thread cannot be cancelled and may go on running."""
        self.abandoned = True
        if self.awaited is not None:
            self.awaited.cancel()


class Agent:
    """The agent `function` and the `reward` function, each sync or async.

    `function` receives the task. `reward` is a scorer (`agl.rewards`), whose parts are combined with `weights`. If it
    has no reward, raises or does not return in time, the reward of the rollout is missing. If `reward` is None, the
    agent emits its rewards itself.
    """

    def __init__(
        self, function: Callable[[Any], Any], reward: Callable[..., Any] | None, weights: Mapping[str, float]
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
                run.context = contextvars.copy_context()
                run.take_answer(self._resolve(run, self._function(rollout.input)))
                answer = {semconv.ROLLOUT_ANSWER: content_json(run.answer)}
                ContentFilter.of().set_content(trace.get_current_span(), lambda: answer)
                if self._reward is not None and not run.abandoned:
                    self._score(run, self._reward)
        except BaseException as error:  # noqa: BLE001 - any failure of the agent, sys.exit included, ends the attempt only
            run.error = describe_error(error)

    def renew_blocked_loop(self) -> None:
        """Start a new event loop for later runs if an async agent blocks the current one."""
        if self._loop.is_blocked():
            logger.warning("an async agent blocks its event loop (a call without await); starting another loop")
            self._loop = AgentLoop()

    def close(self) -> None:
        self._loop.close()

    def _score(self, run: AgentRun, reward: Callable[..., Any]) -> None:
        try:
            result = self._resolve(run, call_scorer(reward, run.rollout.input, run.answer, run.rollout))
            score = read_score(result, self._weights)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - any error of the scorer means that there is no reward
            score = Score(None, missing=describe_error(error))
        if run.abandoned:
            return
        run.score = score
        if score.value is None:
            record_missing_reward(score.missing or "")
        else:
            parts = {semconv.REWARD_PREFIX + name: part for name, part in score.parts.items()}
            agl.emit_reward(score.value, attributes=parts)

    def _resolve(self, run: AgentRun, result: Any) -> Any:
        """`result`, or the value of an awaitable `result`, which runs on the agents' event loop."""
        if not inspect.isawaitable(result):
            return result
        run.awaited = self._loop.submit(result)
        return run.awaited.result()
