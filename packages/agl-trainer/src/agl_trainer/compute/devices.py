"""Several devices, one process each, as torchrun starts them.

The first process leads: it alone samples, keeps the optimizers, writes checkpoints and serves. The others follow: they
hold the frozen base model and do the jobs that the leader hands out, each on its share of the rows. With a job comes
the adapter as it is now, and the gradients that the jobs leave in it are summed at the leader. So a follower keeps
nothing from one job to the next, and no other part of the training knows of it.
"""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from agl.errors import TrainingError
from agl_trainer.model.policy import Policy

Result = TypeVar("Result", covariant=True)
_LEADER = 0
_PATIENCE = timedelta(days=7)
"""A follower waits while the leader samples; torchrun ends it where the leader dies."""


class Job(Protocol[Result]):
    """What one device does; it is sent to it."""

    @property
    def role(self) -> str:
        """Whose adapter it needs, or the name of the base model."""
        ...

    def run(self, policy: Policy) -> Result: ...


@dataclass(frozen=True, slots=True)
class _Failure:
    said: str


class _OutOfStepError(TrainingError):
    """A device cannot go on where all have to, so that none can."""


def count() -> int:
    """How many devices take part."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def lead_or_follow(lead: Callable[[], None], open_policy: Callable[[], Policy]) -> bool:
    """Run `lead` in the first process, while the others do its jobs; returns whether this one led.

    `open_policy` makes the policy of a follower, when the first job arrives. Without torchrun there is one process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        lead()
        return True
    with _joined():
        if dist.get_rank() != _LEADER:
            _follow(open_policy)
            return False
        try:
            lead()
        except _OutOfStepError:
            raise  # the others wait in the middle of a pass, until torchrun ends them
        except BaseException:
            _receive([None] * count())
            raise
        _receive([None] * count())
        return True


def run_everywhere(policy: Policy, jobs: "Sequence[Job[Result]]") -> list[Result]:
    """Have each device do its job, the leader the first; returns what they return.

    The gradients that they leave in the adapter are summed in the leader's. Raises TrainingError where one fails.
    """
    return [jobs[0].run(policy)] if count() == 1 else _take_part(policy, _receive(list(jobs)))


def everyones(value: Any) -> list[Any]:
    """What each device has to say, asked of all of them."""
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def _joined() -> Iterator[None]:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=_PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        # Sharded layers refer to each other in circles, and to the group, without which a process has to end.
        gc.collect()
        dist.destroy_process_group()


def _follow(open_policy: Callable[[], Policy]) -> None:
    policy = None
    while (job := _receive(None)) is not None:
        # Not before the leader has opened its own, which may have made the model's files.
        policy = policy or open_policy()
        try:
            _take_part(policy, job)
        except _OutOfStepError:
            raise
        except TrainingError:
            continue  # the leader raises it too


def _receive(jobs: list[Any] | None) -> Any:
    """The job of this process; `jobs` are the leader's to hand out, None says that there are no more."""
    inbox: list[Any] = [None]
    dist.scatter_object_list(inbox, jobs, src=_LEADER)
    return inbox[0]


def _take_part(policy: Policy, job: "Job[Result]") -> list[Result]:
    parameters = policy.parameters(job.role) if job.role in policy.roles else []
    if parameters:
        _send(parameters)
    try:
        said: Any = job.run(policy)
    except Exception as error:  # the others wait for an answer; it is raised below
        said = _Failure(f"{type(error).__name__}: {error}")
        if policy.is_sharded:
            raise _OutOfStepError(f"a training step failed on device {dist.get_rank()}: {said.said}") from error
    answers = everyones(said)
    failures = [f"device {rank}: {answer.said}" for rank, answer in enumerate(answers) if isinstance(answer, _Failure)]
    if failures:
        raise TrainingError(f"a training step failed on {len(failures)} of {count()} devices: {'; '.join(failures)}")
    if any(parameter.requires_grad for parameter in parameters):
        _sum_gradients(parameters)
    return answers


def _send(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Give the followers the values that the leader has."""
    with torch.no_grad():
        values = parameters_to_vector(parameters)
        dist.broadcast(values, _LEADER)
        vector_to_parameters(values, parameters)


def _sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Leave the sum in the leader's, nothing in the followers'."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = parameters_to_vector(grads)
    dist.reduce(total, _LEADER)
    if dist.get_rank() != _LEADER:
        grads = [None] * len(parameters)
    else:
        vector_to_parameters(total, grads)
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
