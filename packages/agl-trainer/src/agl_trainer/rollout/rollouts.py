"""The rollouts of a step or an evaluation: named, run, run again where it was the engine that failed, and read back."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any

from agl import semconv
from agl.span import Span
from agl.store import Rollout, Store
from agl.trajectory import Trajectory, build_trajectory
from agl_trainer.rollout.runner import Outcome
from agl_trainer.rollout.serving import ProgressLine, Serving

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ran:
    """How rollouts ended, in the order in which they were asked for."""

    outcomes: list[Outcome]
    lost: list[Outcome] = field(default_factory=list)
    """Those whose engine failed, and in whose place others were run."""


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Runs rollouts on what `serving` serves, and says on `progress` what it waits for."""

    store: Store
    serving: Serving
    progress: ProgressLine
    engine_retries: int = 0
    """How often a rollout is run again whose engine failed."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def make(self, name: str, task: Any, group_id: str | None, mode: str) -> Rollout:
        """A rollout whose id no earlier run has used.

        `~n` marks the repetition of one that was cut short; the gateway leaves it out of the seeds, so that the
        repetition samples the same.
        """
        free = next(
            candidate
            for repetition in range(10_000)
            if self.store.get_rollout(candidate := f"{name}~{repetition}" if repetition else name) is None
        )
        return Rollout(free, task, group_id=group_id, mode=mode)

    def make_live(self) -> None:
        """From here on calls are answered by the present weights. Safe for several threads."""
        with self._lock:
            self.serving.engine.make_live()

    def run(self, rollouts: Sequence[Rollout], *, counts_steps: bool = False, is_said: bool = True) -> Ran:
        """Run `rollouts`. `counts_steps`: each is a step of the progress line; `is_said`: it says what is waited for.

        Safe for several threads.
        """
        on_done = self._say(len(rollouts), counts_steps=counts_steps) if is_said else _say_nothing
        outcomes, lost = self.serving.runner.run(rollouts, on_done=on_done), list[Outcome]()
        for _ in range(self.engine_retries):
            places = [place for place, outcome in enumerate(outcomes) if self._was_lost(outcome)]
            if not places:
                break
            logger.warning("the engine failed %d of %d rollouts; running them again", len(places), len(outcomes))
            lost += [outcomes[place] for place in places]
            with self._lock:
                self.serving.engine.revive()
            self.make_live()
            repeated = self.serving.runner.run([self._again(rollouts[place]) for place in places])
            for place, outcome in zip(places, repeated, strict=True):
                outcomes[place] = outcome
        return Ran(outcomes, lost)

    def trajectories(self, outcomes: Sequence[Outcome]) -> list[Trajectory]:
        """Those of the rollouts that left any span: an agent that hangs may leave none, and no word of its failure."""
        found = []
        for outcome in outcomes:
            if spans := self.store.query_spans(outcome.rollout_id):
                trajectory = build_trajectory(spans)
                found.append(replace(trajectory, error=trajectory.error or outcome.error))
        return found

    def _say(self, count: int, *, counts_steps: bool) -> Callable[[Outcome], None]:
        """What to do as each of `count` rollouts ends."""
        engine, started, left = self.serving.engine, time.monotonic(), count
        before = engine.tokens_sampled

        def on_done(_: Outcome) -> None:
            nonlocal left
            left -= 1
            after, speed = engine.tokens_sampled, None
            if before is not None and after is not None:
                speed = (after - before) / (time.monotonic() - started)
            done = {"step": count - left} if counts_steps else {}
            self.progress.update(tokens_per_s=speed, waiting_for=f"{left} of {count} rollouts", **done)

        return on_done

    def _again(self, rollout: Rollout) -> Rollout:
        return self.make(rollout.rollout_id.partition("~")[0], rollout.input, rollout.group_id, rollout.mode)

    def _was_lost(self, outcome: Outcome) -> bool:
        return outcome.error is not None and any(map(_is_engine_failure, self.store.query_spans(outcome.rollout_id)))


def _say_nothing(_: Outcome) -> None:
    pass


def _is_engine_failure(span: Span) -> bool:
    """A call that the gateway could not have answered: the engine failed, or was not there."""
    if span.name != semconv.SPAN_GATEWAY_CALL or span.status != "error":
        return False
    status = span.number(semconv.HTTP_RESPONSE_STATUS_CODE)
    return status is not None and status >= HTTPStatus.INTERNAL_SERVER_ERROR
