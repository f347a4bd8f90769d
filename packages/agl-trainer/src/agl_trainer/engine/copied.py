"""An in-process engine with its own copy of the adapters, so that it samples while the policy trains."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from agl.config import LogprobsMode
from agl_trainer.engine.local.scheduler import Scheduler
from agl_trainer.model.policy import Policy


class CopiedEngine:
    """`scheduler` samples from `copy`, a second policy with the same base model; adapters are copied from `policy`."""

    logprobs_mode: LogprobsMode = "processed_logprobs"
    running_rollouts = staticmethod(nullcontext[None])

    def __init__(self, policy: Policy, copy: Policy, scheduler: Scheduler) -> None:
        self._policy = policy
        self._copy = copy
        self._scheduler = scheduler

    @property
    def tokens_sampled(self) -> int:
        return self._scheduler.tokens_sampled

    def make_live(self) -> None:
        """Copy the adapters that have changed once no call runs; running calls finish with their old version."""
        changed = [role for role in self._policy.roles if self._policy.versions[role] != self._copy.versions[role]]
        if not changed:
            return
        with self._policy.lock:
            adapters = {role: {name: t.clone() for name, t in self._policy.adapter(role).items()} for role in changed}
            versions = dict(self._policy.versions)
        with self._scheduler.paused(), self._copy.lock:
            for role, adapter in adapters.items():
                self._copy.load_adapter(role, adapter, versions[role])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does nothing: the policy that trains is not the one that samples."""
        yield

    def revive(self) -> None:
        self._scheduler.revive()
