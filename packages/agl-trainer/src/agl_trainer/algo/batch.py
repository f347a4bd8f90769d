"""The batch of a training step: rows to train on, and an outcome for every call of its rollouts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from agl.trajectory import Call, DropReason
from agl_trainer.data.rows import SampledRow


@dataclass(frozen=True, slots=True)
class CallOutcome:
    """The advantage that a call trains with, or the reason why it does not train."""

    call: Call
    advantage: float | None
    reason: DropReason | None = None
    minibatch: int = 0
    weight: float | None = None
    """Factor on the loss of each of its tokens."""
    ratios: Sequence[float] = ()
    """Importance ratio of each of its tokens in the optimizer step, if it had one."""


@dataclass(slots=True)
class GrpoBatch:
    """Rows by role, and the outcome of every call."""

    rows: dict[str, list[SampledRow]] = field(default_factory=dict)
    outcomes: list[CallOutcome] = field(default_factory=list)
    credits: dict[str, list[float]] = field(default_factory=dict)
    """For each role that trains, its credit in each of its rewarded rollouts."""
    represented: dict[str, list[float]] = field(default_factory=dict)
    """For each of these credits, how many rollouts its own stands for, relative to the mean of the store."""
    zero_variance_groups: list[str] = field(default_factory=list)
    """Ids of the groups in which no call can train, because all earned the same or no reward reaches them (DAPO, arXiv
    2503.14476, section 3.2)."""

    def dropped(self) -> dict[str, int]:
        """Number of calls that do not train, by reason."""
        return dict(Counter(outcome.reason for outcome in self.outcomes if outcome.reason is not None))

    def minibatches(self, roles: Sequence[str]) -> dict[int, list[SampledRow]]:
        """The rows of `roles`, which share an adapter, by the number of their optimizer step."""
        rows = [row for role in roles for row in self.rows.get(role, ())]
        return {
            number: [row for row in rows if row.minibatch == number] for number in sorted({r.minibatch for r in rows})
        }

    def skip(self, roles: Sequence[str], minibatch: int) -> None:
        """Mark the calls of `roles` in `minibatch` as dropped: their optimizer step was skipped."""
        self.outcomes = [
            replace(outcome, advantage=None, weight=None, reason=DropReason.SKIPPED_STEP)
            if outcome.reason is None and outcome.minibatch == minibatch and outcome.call.role in roles
            else outcome
            for outcome in self.outcomes
        ]

    def add_ratios(self, ratios: Mapping[str, Sequence[float]]) -> None:
        """Add the importance ratios of an optimizer step, which are by span id, to the calls that it trained."""
        self.outcomes = [
            replace(outcome, ratios=ratios[outcome.call.span_id])
            if outcome.reason is None and outcome.call.span_id in ratios
            else outcome
            for outcome in self.outcomes
        ]


def version_number(version: str | None) -> int | None:
    """3 for `writer@3`; None without a number."""
    number = (version or "").rpartition("@")[2]
    return int(number) if number.isdigit() else None
