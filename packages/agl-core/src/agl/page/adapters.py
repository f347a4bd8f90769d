"""Adapters that trainings published, by role, with the evaluations of their runs and where each answers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from agl.store import Resource, Store


@dataclass(frozen=True, slots=True)
class Adapter:
    """The versions of a role in a run, the newest first."""

    name: str
    versions: Sequence[Resource]
    reward: float | None
    """Mean reward of the last evaluation of its run."""
    live: str | None
    """The version by which the gateway answers for the role."""

    @property
    def role(self) -> str:
        return self.name.rpartition("/")[2]

    @property
    def run(self) -> str:
        return self.name.rpartition("/")[0]


def list_adapters(store: Store, live: Mapping[str, str]) -> Iterator[Adapter]:
    """`live`: by role the version that the gateway sends its calls to."""
    # RUN/ROLE. The names of other resources have a space.
    resources = (each for each in store.query_resources() if "/" in each.name and " " not in each.name)
    for name, versions in groupby(resources, key=lambda resource: resource.name):
        run, _, role = name.rpartition("/")
        evaluated = store.query_metrics(run).get("eval/reward/mean", [])
        yield Adapter(name, [*versions][::-1], evaluated[-1][1] if evaluated else None, live.get(role))
