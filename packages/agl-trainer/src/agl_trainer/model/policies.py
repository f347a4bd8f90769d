"""The policies of a training, one for each base model, and their adapters by role, of which each is on one of them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from agl_trainer.model.policy import Policy


class Policies:
    """One or more policies with different roles."""

    def __init__(self, policies: Sequence[Policy]) -> None:
        self._policies = tuple(policies)
        self._by_role = {role: policy for policy in policies for role in policy.roles}

    def __iter__(self) -> Iterator[Policy]:
        return iter(self._policies)

    def of(self, role: str) -> Policy:
        """The policy that has the adapter of `role`."""
        return self._by_role[role]

    @property
    def roles(self) -> list[str]:
        return list(self._by_role)

    @property
    def adapters(self) -> dict[str, list[str]]:
        """Each role that owns an adapter, with all the roles that use it."""
        return {owner: roles for policy in self._policies for owner, roles in policy.adapters.items()}

    @property
    def versions(self) -> dict[str, int]:
        """The version of each role; a copy."""
        return {role: version for policy in self._policies for role, version in policy.versions.items()}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Context in which no engine of this process samples from any of them."""
        with ExitStack() as stack:
            for policy in self._policies:
                stack.enter_context(policy.lock)
            yield
