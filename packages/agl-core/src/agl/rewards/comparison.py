"""How the rewards of rollouts change under another scorer or other weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from agl.rewards.score import Score


@dataclass(frozen=True, slots=True)
class Rescored:
    """A rollout with the score that it has, and the one that it would get."""

    rollout_id: str
    group_id: str | None
    old: Score
    new: Score


@dataclass(frozen=True, slots=True)
class Comparison:
    """Means, and how the order of rollouts in their groups changes. Training follows the order, not the mean."""

    rollouts: Sequence[Rescored]

    def means(self) -> dict[str, tuple[float | None, float | None]]:
        """Old and new mean of `reward` and of each part, over the rollouts that have it."""
        olds, news = [one.old for one in self.rollouts], [one.new for one in self.rollouts]
        names = dict.fromkeys(name for score in olds + news for name in score.parts)
        found = {"reward": (_mean(score.value for score in olds), _mean(score.value for score in news))}
        return found | {
            name: (_mean(score.parts.get(name) for score in olds), _mean(score.parts.get(name) for score in news))
            for name in names
        }

    def missing(self) -> tuple[int, int]:
        """Number of rollouts without an old and without a new reward."""
        return (
            sum(one.old.value is None for one in self.rollouts),
            sum(one.new.value is None for one in self.rollouts),
        )

    def groups(self) -> dict[str, list[tuple[str, float, float]]]:
        """Groups of two or more rollouts with both rewards: id, old and new reward of each."""
        found: dict[str, list[tuple[str, float, float]]] = {}
        for one in self.rollouts:
            if one.group_id and one.old.value is not None and one.new.value is not None:
                found.setdefault(one.group_id, []).append((one.rollout_id, one.old.value, one.new.value))
        return {group: members for group, members in found.items() if len(members) > 1}

    def rank_correlation(self) -> float | None:
        """Mean over groups of Spearman's rank correlation of old and new; None if no group varies in both."""
        found = (
            _spearman([old for _, old, _ in members], [new for *_, new in members])
            for members in self.groups().values()
        )
        return _mean(found)

    def changed_groups(self) -> list[str]:
        """Groups in which the old reward orders two rollouts otherwise than the new one, ties included."""
        return [
            group
            for group, members in self.groups().items()
            if any(_sign(a[1] - b[1]) != _sign(a[2] - b[2]) for a, b in combinations(members, 2))
        ]

    def to_json(self) -> dict[str, Any]:
        groups, missing = self.groups(), self.missing()
        return {
            "rollouts": len(self.rollouts),
            "missing": {"old": missing[0], "new": missing[1]},
            "means": {name: {"old": old, "new": new} for name, (old, new) in self.means().items()},
            "groups": len(groups),
            "rank_correlation": self.rank_correlation(),
            "changed_groups": [
                {
                    "group_id": group,
                    "rollouts": [{"rollout_id": name, "old": old, "new": new} for name, old, new in groups[group]],
                }
                for group in self.changed_groups()
            ],
        }


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0; equal values share the mean of theirs."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def _spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Correlation of the ranks; None if one of both does not vary."""
    first, second = _ranks(one), _ranks(other)
    middle = (len(one) - 1) / 2
    products = sum((a - middle) * (b - middle) for a, b in zip(first, second, strict=True))
    squares = sum((a - middle) ** 2 for a in first) * sum((b - middle) ** 2 for b in second)
    return products / squares**0.5 if squares else None
