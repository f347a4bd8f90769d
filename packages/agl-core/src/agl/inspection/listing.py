"""Rollouts in a list, and which of them a person asks for."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import ge, gt, le, lt
from typing import Final, Self

from agl.errors import InputError
from agl.inspection.report import CallReport, report_calls
from agl.span import Span
from agl.store import Rollout, Store
from agl.trajectory import Trajectory, build_trajectory, collect_trained

_COMPARISONS: Final = {">=": ge, ">": gt, "<=": le, "<": lt, "": ge}

RewardFilter = Callable[[float | None], bool]


@dataclass(frozen=True, slots=True)
class ListedRollout:
    """A rollout with its spans, and the reward that a list shows: that of a role, or of the rollout."""

    spans: Sequence[Span]
    trajectory: Trajectory
    reward: float | None
    run: str | None
    """The training that queued it."""

    @classmethod
    def of(cls, spans: Sequence[Span], queued: Rollout | None, role: str | None = None) -> Self:
        trajectory = build_trajectory(spans)
        of_role = [
            reward.value for reward in trajectory.rewards if role and (reward.role, reward.target) == (role, None)
        ]
        run = queued.metadata.get("run") if queued else None
        return cls(spans, trajectory, of_role[-1] if of_role else trajectory.reward, run)

    @property
    def start_ns(self) -> int:
        return min(span.start_ns for span in self.spans)

    @property
    def is_left_out(self) -> bool:
        """Whether sampling left it out: its rewards are known, its spans are not."""
        sampled = self.trajectory.sampled
        return sampled is not None and not sampled.decision.kept

    @property
    def roles(self) -> list[str]:
        found = [call.role for call in self.trajectory.calls]
        return list(dict.fromkeys(found or (self.trajectory.sampled.roles if self.trajectory.sampled else ())))

    @property
    def versions(self) -> list[str]:
        """Policy versions that answered its calls."""
        found = [call.policy_version for call in self.trajectory.calls if call.policy_version]
        return list(dict.fromkeys(found or (self.trajectory.sampled.versions if self.trajectory.sampled else ())))

    @property
    def reports(self) -> list[CallReport]:
        return report_calls(self.trajectory, collect_trained(self.spans))

    def is_of_run(self, run: str) -> bool:
        trained = (each.run for steps in collect_trained(self.spans).values() for each in steps)
        return run == self.run or run in trained


@dataclass(frozen=True, slots=True)
class Selection:
    """What a rollout in a list must have. None: anything."""

    run: str | None = None
    mode: str | None = None
    role: str | None = None
    reward: RewardFilter | None = None
    error: str | None = None
    """It failed, with an error that contains this."""
    version: str | None = None
    outcome: str | None = None
    """One of its calls has this outcome: `trained`, `pending`, or a reason."""
    text: str | None = None
    """A text attribute of one of its spans contains this, in any case."""
    since_ns: float | None = None

    def admits(self, listed: ListedRollout) -> bool:
        trajectory = listed.trajectory
        return (
            (self.run is None or listed.is_of_run(self.run))
            and self.mode in (None, trajectory.mode)
            and (self.role is None or self.role in listed.roles)
            and (self.version is None or self.version in listed.versions)
            and (self.reward is None or self.reward(listed.reward))
            and (self.error is None or (trajectory.error is not None and self.error in trajectory.error))
            and (self.outcome is None or any(report.outcome == self.outcome for report in listed.reports))
            and (self.since_ns is None or listed.start_ns >= self.since_ns)
            and (self.text is None or _contains(listed.spans, self.text.casefold()))
        )


def read_listed(store: Store, rollout_ids: Sequence[str], role: str | None = None) -> dict[str, ListedRollout]:
    """Those of these rollouts that have spans, in their order."""
    found, queued = store.query_spans_by_rollout(rollout_ids), store.get_rollouts(rollout_ids)
    return {name: ListedRollout.of(spans, queued.get(name), role) for name, spans in found.items() if spans}


def reward_filter(text: str) -> RewardFilter:
    """`0.5`, `>=0.5`, `>0.5`, `<=0.5`, `<0.5`, `none` or `any`. Raises InputError for anything else."""
    if text in ("none", "any"):
        return lambda reward: (reward is None) == (text == "none")
    # Each text matches in one way only: a pattern that tries several takes minutes for a long one.
    match = re.fullmatch(r"([<>]=?|)\s*([-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?)", text)
    if match is None:
        raise InputError(f"{text[:80]!r} is not a reward such as 0.5, '>0.5', '<=0.5', none or any")
    compare, bound = _COMPARISONS[match[1]], float(match[2])
    return lambda reward: reward is not None and compare(reward, bound)


def _contains(spans: Sequence[Span], text: str) -> bool:
    return any(
        text in value.casefold() for span in spans for value in span.attributes.values() if isinstance(value, str)
    )
