"""Training on several devices, with one process per device started by torchrun.

The first process is the leader: it alone samples, owns the optimizers, writes checkpoints and serves. The followers
hold the frozen base model and run the jobs that the leader sends, each on its share of the rows. Before a job the
leader broadcasts the current adapter; after it, the gradients are summed at the leader. So followers keep no state
between jobs, and the rest of the training is written for one process.
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
from agl_trainer.model.device import best_device
from agl_trainer.model.policy import Policy

Result = TypeVar("Result", covariant=True)
_LEADER = 0
_TIMEOUT = timedelta(days=7)
"""Followers wait while the leader samples; torchrun ends them if the leader dies."""


class Job(Protocol[Result]):
    """Work of one device; it is pickled and sent there."""

    @property
    def role(self) -> str:
        """The role whose adapter it needs, or the name of the base model."""
        ...

    def run(self, policy: Policy) -> Result: ...


@dataclass(frozen=True, slots=True)
class _Failure:
    message: str


class _CollectiveError(TrainingError):
    """A device failed within a pass with collective calls, so that the other devices cannot continue."""


def process_count() -> int:
    """Number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device_count() -> int:
    """Number of devices that take part in the training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def lead_or_follow(lead: Callable[[], None], open_policy: Callable[[], Policy]) -> bool:
    """Run `lead` in the leader, and the leader's jobs in the followers; returns whether this process is the leader.

    `open_policy` creates the policy of a follower when its first job arrives. Without torchrun there is one process.
    """
    if process_count() == 1:
        lead()
        return True
    with process_group():
        if dist.get_rank() != _LEADER:
            _follow(open_policy)
            return False
        try:
            lead()
        except _CollectiveError:
            raise  # the followers wait in the middle of a pass until torchrun ends them
        except BaseException:
            _receive([None] * device_count())
            raise
        _receive([None] * device_count())
        return True


def run_on_all(policy: Policy, jobs: "Sequence[Job[Result]]") -> list[Result]:
    """Run one job per device, the first on the leader; returns their results in order.

    The gradients of the adapter are summed at the leader. Raises TrainingError if a job fails.
    """
    return [jobs[0].run(policy)] if device_count() == 1 else _run_job(policy, _receive(list(jobs)))


def gather_objects(value: Any) -> list[Any]:
    """The `value` of every device, by rank. A collective call."""
    values: list[Any] = [None] * device_count()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def process_group() -> Iterator[None]:
    """The group of the processes of `torchrun`, of which each computes on its own device."""
    device, backends = best_device().type, "gloo"
    if device != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        backends = f"cpu:gloo,{device}:{dist.get_default_backend_for_device(device)}"
    dist.init_process_group(backends, timeout=_TIMEOUT)
    try:
        yield
    finally:
        # Sharded layers form reference cycles that hold the process group; free them before it is destroyed.
        gc.collect()
        dist.destroy_process_group()


def _follow(open_policy: Callable[[], Policy]) -> None:
    policy = None
    while (job := _receive(None)) is not None:
        # Only now: the leader has opened its policy, which may have created the model's files.
        policy = policy or open_policy()
        try:
            _run_job(policy, job)
        except _CollectiveError:
            raise
        except TrainingError:
            continue  # the leader raises the same error


def _receive(jobs: list[Any] | None) -> Any:
    """The job of this process. The leader passes the `jobs` of all devices; a job of None ends a follower."""
    inbox: list[Any] = [None]
    dist.scatter_object_list(inbox, jobs, src=_LEADER)
    return inbox[0]


def _run_job(policy: Policy, job: "Job[Result]") -> list[Result]:
    parameters = policy.parameters(job.role) if job.role in policy.roles else []
    if parameters:
        _broadcast(parameters)
    try:
        result: Any = job.run(policy)
    except Exception as error:  # all devices have to take part in the gather below, which raises it
        result = _Failure(f"{type(error).__name__}: {error}")
        if policy.is_sharded:
            raise _CollectiveError(f"a training step failed on device {dist.get_rank()}: {result.message}") from error
    results = gather_objects(result)
    failures = [f"device {rank}: {one.message}" for rank, one in enumerate(results) if isinstance(one, _Failure)]
    if failures:
        raise TrainingError(
            f"a training step failed on {len(failures)} of {device_count()} devices: {'; '.join(failures)}"
        )
    if any(parameter.requires_grad for parameter in parameters):
        _sum_gradients(parameters)
    return results


def _broadcast(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Set the parameters of all devices to the leader's values."""
    with torch.no_grad():
        values = parameters_to_vector(parameters)
        dist.broadcast(values, _LEADER)
        vector_to_parameters(values, parameters)


def _sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Sum the gradients of all devices at the leader, and clear those of the followers."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = parameters_to_vector(grads)
    dist.reduce(total, _LEADER)
    if dist.get_rank() != _LEADER:
        grads = [None] * len(parameters)
    else:
        vector_to_parameters(total, grads)
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
