"""Runs the rollouts of a step or an evaluation, repeats those whose engine failed, and reads their trajectories."""

import logging
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from agl.runner.runner import Outcome
from agl.store import Rollout, Store
from agl.trajectory import Trajectory, build_trajectory
from agl.trajectory.call import is_engine_failure
from agl_trainer.rollout.serving import Serving, ShownProgress

logger = logging.getLogger(__name__)

_REPETITION = re.compile(r"~\d+\Z")


def first_name(rollout_id: str) -> str:
    """The id without the `~n` of a repetition."""
    return _REPETITION.sub("", rollout_id)


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Makes and runs rollouts on `serving`; `progress` shows how many are left. Thread-safe."""

    store: Store
    serving: Serving
    progress: ShownProgress
    run_id: str
    engine_retries: int = 0
    """How often a rollout is repeated whose engine failed."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def make(self, name: str, task: Any, group_id: str | None, mode: str, seed: int) -> Rollout:
        """A rollout that samples with `seed`; its id is `name`, or `name~n` if earlier ones with it were cut short."""
        return Rollout(
            self._unused(name), task, group_id=group_id, mode=mode, metadata={"seed": seed, "run": self.run_id}
        )

    def make_live(self) -> None:
        """Answer later calls with the policy's current weights."""
        with self._lock:
            self.serving.engine.make_live()

    def run(
        self, rollouts: Sequence[Rollout], *, counts_steps: bool = False, shows_progress: bool = True
    ) -> list[Outcome]:
        """Outcomes in order, then those of repeated runs; `counts_steps`: each is a step of the progress."""
        with self.serving.engine.running_rollouts():
            return self._run(rollouts, counts_steps, shows_progress)

    def _run(self, rollouts: Sequence[Rollout], counts_steps: bool, shows_progress: bool) -> list[Outcome]:
        on_done = self._show_progress(len(rollouts), counts_steps=counts_steps) if shows_progress else lambda _: None
        outcomes, failed = self.serving.runner.run(rollouts, on_done=on_done), list[Outcome]()
        for _ in range(self.engine_retries):
            repeated = [index for index, outcome in enumerate(outcomes) if self._engine_failed(outcome)]
            if not repeated:
                break
            logger.warning("the engine failed %d of %d rollouts; running them again", len(repeated), len(outcomes))
            failed += [outcomes[index] for index in repeated]
            with self._lock:
                self.serving.engine.revive()
            self.make_live()
            new = self.serving.runner.run([self._repetition(rollouts[index]) for index in repeated])
            for index, outcome in zip(repeated, new, strict=True):
                outcomes[index] = outcome
        return outcomes + failed

    def trajectories(self, outcomes: Sequence[Outcome]) -> list[Trajectory]:
        """Trajectories of the rollouts that left spans, with the outcome's error if the spans have none.

        An agent that hangs may leave no span, or none that records its failure.
        """
        found = []
        stored = self.store.query_spans_by_rollout([outcome.rollout_id for outcome in outcomes])
        for outcome in outcomes:
            if spans := stored[outcome.rollout_id]:
                trajectory = build_trajectory(spans)
                found.append(replace(trajectory, error=trajectory.error or outcome.error))
        return found

    def _show_progress(self, count: int, *, counts_steps: bool) -> Callable[[Outcome], None]:
        """Callback that updates the progress as each of `count` rollouts ends."""
        engine, started, left = self.serving.engine, time.monotonic(), count
        before = engine.tokens_sampled

        def on_done(_: Outcome) -> None:
            nonlocal left
            left -= 1
            after, speed = engine.tokens_sampled, None
            if before is not None and after is not None:
                speed = (after - before) / (time.monotonic() - started)
            waiting_for = f"{left} of {count} rollouts" if left else None
            done = {"step": count - left} if counts_steps else {"waiting_for": waiting_for}
            self.progress.update(tokens_per_s=speed, **done)

        return on_done

    def _repetition(self, rollout: Rollout) -> Rollout:
        return replace(rollout, rollout_id=self._unused(first_name(rollout.rollout_id)))

    def _unused(self, name: str) -> str:
        return next(
            candidate
            for repetition in range(10_000)
            if self.store.get_rollout(candidate := f"{name}~{repetition}" if repetition else name) is None
        )

    def _engine_failed(self, outcome: Outcome) -> bool:
        return outcome.error is not None and any(map(is_engine_failure, self.store.query_spans(outcome.rollout_id)))
