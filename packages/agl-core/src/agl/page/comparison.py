"""Two evaluations of a run on the same held-out tasks, side by side."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

from agl.errors import UnknownIdError
from agl.inspection.conversation import read_conversation, text_of
from agl.inspection.evaluation import evaluation_prefix
from agl.inspection.listing import ListedRollout, read_listed
from agl.store import Resource, Store

_MAX_TASKS: Final = 400


@dataclass(frozen=True, slots=True)
class Side:
    """A task's rollout of one evaluation."""

    rollout_id: str
    reward: float | None
    answer: str


@dataclass(frozen=True, slots=True)
class TaskPair:
    task: str
    left: Side
    right: Side

    @property
    def change(self) -> float | None:
        values = self.left.reward, self.right.reward
        return None if values[0] is None or values[1] is None else values[1] - values[0]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The tasks that both evaluations have, the largest regression first."""

    run: str
    labels: list[str]
    left: str
    right: str
    pairs: list[TaskPair]

    @classmethod
    def of(cls, store: Store, run: str, left: str, right: str) -> Self:
        """By default the first and the last evaluation. Raises UnknownIdError for one that the store does not know."""
        found = {name_of(resource): resource for resource in evaluations(store, run)}
        labels = list(found)
        left, right = left or (labels[0] if labels else ""), right or (labels[-1] if labels else "")
        for label in (left, right):
            if label and label not in found:
                raise UnknownIdError(f"{store.uri} has no evaluation {label!r} of run {run!r}")
        if len(labels) < 2:
            return cls(run, labels, left, right, [])
        first, second = (dict(found[label].metadata["rollouts"]) for label in (left, right))
        tasks = [task for task in first if task in second][:_MAX_TASKS]
        names = [str(evaluation[task]) for evaluation in (first, second) for task in tasks]
        found = read_listed(store, names)
        sides = {name: _side(name, found.get(name)) for name in names}
        pairs = [TaskPair(task, sides[str(first[task])], sides[str(second[task])]) for task in tasks]
        pairs.sort(key=lambda pair: (pair.change is None, pair.change or 0.0))
        return cls(run, labels, left, right, pairs)

    def mean(self, side: str) -> float | None:
        rewards = [getattr(pair, side).reward for pair in self.pairs]
        known = [reward for reward in rewards if reward is not None]
        return sum(known) / len(known) if known else None

    def commonest(self, side: str) -> tuple[str, float]:
        """The commonest answer and its share."""
        counts: dict[str, int] = {}
        for pair in self.pairs:
            answer = getattr(pair, side).answer
            counts[answer] = counts.get(answer, 0) + 1
        answer = max(counts, key=lambda text: counts[text], default="")
        return answer, counts.get(answer, 0) / max(len(self.pairs), 1)

    @property
    def counts(self) -> Mapping[str, int]:
        changes = [pair.change for pair in self.pairs if pair.change is not None]
        better, worse = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
        unknown = {"without both rewards": len(self.pairs) - len(changes)} if len(changes) < len(self.pairs) else {}
        return {"worse": worse, "equal": len(changes) - better - worse, "better": better, **unknown}


def evaluations(store: Store, run: str) -> list[Resource]:
    """The evaluations of `run` in the order in which they were made."""
    found = store.query_resources(evaluation_prefix(run))
    newest: dict[str, Resource] = {resource.name: resource for resource in found}
    return sorted(newest.values(), key=lambda resource: resource.metadata.get("made_ns", 0))


def name_of(evaluation: Resource) -> str:
    return evaluation.name.rpartition("/")[2]


def _side(rollout_id: str, listed: ListedRollout | None) -> Side:
    if listed is None:
        return Side(rollout_id, None, "")
    calls = listed.trajectory.calls
    answer = read_conversation(calls[-1], {span.span_id: span for span in listed.spans}).answer if calls else None
    failed = f"failed: {listed.trajectory.error}" if listed.trajectory.error else ""
    return Side(rollout_id, listed.reward, failed or (text_of(answer) if answer else ""))
