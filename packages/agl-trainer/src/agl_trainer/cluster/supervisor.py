"""The actor that compares what a training wants with what runs, and starts what is missing."""

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from agl.cli.interrupt import INTERRUPTED
from agl_trainer.cluster.deaths import Deaths
from agl_trainer.cluster.plan import Plan
from agl_trainer.cluster.worker import State, Worker

logger = logging.getLogger(__name__)

NAMESPACE: Final = "agl"
_LOOK_S: Final = 0.5
_ASK_S: Final = 10.0
_STOP_S: Final = 30.0
_WAITS_S: Final = 30.0
"""Time without an answer of the trainer after which a line says so, and between two such lines."""
_MANY, _MANY_IN_S = 5, 600.0
"""More deaths of one process in this time are no accident."""
_CANNOT_RUN: Final = 2


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a training ended."""

    code: int
    message: str = ""


class Supervisor:
    """Keeps the processes of `plan` running until the training has ended.

    Workers are detached actors with names, so that a supervisor that Ray starts again finds them.
    """

    def __init__(self, plan: Plan) -> None:
        # It warns of actors in a group that is removed; ours end first.
        logging.getLogger("ray.actor").setLevel(logging.ERROR)
        self._plan = plan
        self._stop = threading.Event()
        self._has_started = False
        self._deaths = Deaths(_MANY, _MANY_IN_S)
        self._work = ThreadPoolExecutor(1).submit(self._supervise)

    def plan(self) -> Plan:
        return self._plan

    def outcome(self) -> Outcome | None:
        """None while it trains. Raises what ended the supervision."""
        return self._work.result() if self._work.done() else None

    def stop(self) -> None:
        """Have the training end; `outcome` says when it has."""
        self._stop.set()

    def _supervise(self) -> Outcome:
        group = _group(self._plan)
        trainers = [self._trainer(rank, group) for rank in range(self._plan.processes)]
        runners = [self._runner(number) for number in range(self._plan.ray.runners.count)]
        try:
            heard = time.monotonic()
            while not self._stop.wait(_LOOK_S):
                try:
                    outcome = self._look(trainers, runners)
                except RayError as error:  # An actor has died and comes back, or waits for its place.
                    if time.monotonic() - heard > _WAITS_S:
                        heard = time.monotonic()
                        logger.warning("an actor does not answer: %s", str(error).splitlines()[0])
                    continue
                if outcome is not None:
                    return outcome
                heard = time.monotonic()
            return Outcome(INTERRUPTED)
        finally:
            _end(runners, 0.0)  # What they run is no part of a step.
            _end(trainers, _STOP_S)
            remove_placement_group(group)

    def _look(self, trainers: list[Any], runners: list[Any]) -> Outcome | None:
        """Start what does not run as wanted. Raises RayError if a worker does not answer."""
        host = None if self._plan.token else "127.0.0.1"
        address = _ask(trainers[0].address.remote(host))
        states: list[State] = _ask([trainer.state.remote() for trainer in trainers])
        leader = states[0]
        if leader.code is not None and leader.code >= 0 and leader.code != INTERRUPTED:
            return Outcome(leader.code, "see the lines of trainer-0" if leader.code else "")
        jobs = [self._plan.trainer_job(rank, address) for rank in range(len(trainers))]
        if any(state.job != job or state.code for state, job in zip(states, jobs, strict=True)):
            if self._has_started and (outcome := self._note_death(states)):
                return outcome
            self._has_started = True
            _ask([trainer.start.remote(job) for trainer, job in zip(trainers, jobs, strict=True)])
            return None
        run = _ask(trainers[0].serving.remote(address, self._plan.output_dir))
        return self._look_at_runners(runners, run, address) if run is not None else None

    def _look_at_runners(self, runners: list[Any], run: str, address: Any) -> Outcome | None:
        job = self._plan.runner_job(run, address)
        for number, runner in enumerate(runners):
            state: State | None = _ask_or_none(runner.state.remote())
            if state is None or (state.job == job and state.code is None):
                continue
            if state.job == job:
                name = f"runner-{number}"
                if state.code == _CANNOT_RUN or self._deaths.are_no_accident(name, time.monotonic()):
                    return Outcome(_CANNOT_RUN, f"{name} ended with exit code {state.code}; see its lines")
                logger.warning("%s ended with exit code %s; it starts again", name, state.code)
            _ask_or_none(runner.start.remote(job))
        return None

    def _note_death(self, states: list[State]) -> Outcome | None:
        """Log that the training starts again; an outcome if it died too often."""
        codes = ", ".join("of its actor" if state.job is None else str(state.code) for state in states)
        if self._deaths.are_no_accident("trainer", time.monotonic()):
            return Outcome(1, f"the training died more than {_MANY} times in {_MANY_IN_S:g} s (exit code {codes})")
        logger.warning("the training died (exit code %s); it resumes at its last checkpoint", codes)
        return None

    def _trainer(self, rank: int, group: PlacementGroup) -> Any:
        trainer = self._plan.ray.trainer
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
        gpus = 1 if trainer.devices else 0
        return self._worker(f"trainer-{rank}", num_cpus=trainer.cpus, num_gpus=gpus, scheduling_strategy=place)

    def _runner(self, number: int) -> Any:
        return self._worker(f"runner-{number}", num_cpus=self._plan.ray.runners.cpus)

    def _worker(self, name: str, **needs: Any) -> Any:
        made = ray.remote(Worker).options(
            name=f"{self._plan.name} {name}",
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_task_retries=0,
            **needs,
        )
        return made.remote(name, self._plan.folder)


def _group(plan: Plan) -> PlacementGroup:
    """The places of the processes that train, as close together as possible."""
    name = f"{plan.name} trainers"
    try:
        return ray.util.get_placement_group(name)
    except ValueError:  # There is none of this name.
        bundles = [plan.bundle()] * plan.processes
        return placement_group(bundles, strategy="PACK", name=name, lifetime="detached")


def _ask(request: Any) -> Any:
    return ray.get(request, timeout=_ASK_S)


def _ask_or_none(request: Any) -> Any:
    """None if the worker does not answer: it has died and comes back."""
    try:
        return _ask(request)
    except RayError:
        return None


def _end(workers: list[Any], grace_s: float) -> None:
    """End the processes, in order if they have `grace_s` seconds, and then the actors."""
    stopping = [worker.stop.remote(grace_s) for worker in workers]
    ray.wait(stopping, num_returns=len(stopping), timeout=grace_s + _ASK_S)
    for worker in workers:
        ray.kill(worker)
