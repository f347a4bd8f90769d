"""GRPO over trajectories: advantages per role at rollout level, rows with a weight, and the account of every call.

    G_r  = mean over the role's calls in rollout r of their credit
    A_r  = the advantage of G_r among the rollouts of its group; see `advantages`
    A_c  = A_r * d_c / mean(d)  +  (e_c - mean(e)) / (sqrt(std^2 + within^2) + 1e-4)

d_c: discount of the reward that call c shares; e_c: what it earned by itself; means over the role's calls in r.
std: what A_r was divided by; within: the standard deviation of e_c - mean(e) over the same rollouts; nothing is
divided where A_r was not. So discounts and rewards on calls tell the calls of a rollout apart, and rollouts are told
apart by what they earned as a whole. With one call in a rollout, or none of both, A_c is A_r.

Rows are weighted over the optimizer step, `normalization`. The groups of a step may be dealt out to several
optimizer steps, its minibatches (PPO, arXiv 1707.06347, algorithm 1).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from agl.trajectory import Call, DropReason, Row, Trajectory, Turn
from agl_trainer.algo.advantages import EPSILON, AdvantageName, Estimate, Scale, estimate, group_members
from agl_trainer.algo.credit import Credit, Overlong, Weights, call_credits, role_credit
from agl_trainer.algo.normalization import batch_weights, rollout_weights
from agl_trainer.algo.options import LossName
from agl_trainer.algo.rejection import Rejection
from agl_trainer.data.rows import SampledRow

_NOTHING = 1e-6
"""An advantage below this is the rounding of equal rewards."""


@dataclass(frozen=True, slots=True)
class RoleState:
    """What a step has to know of a role."""

    trains: bool = True
    version: int | None = None
    """Of its policy now."""
    weights: Weights = field(default_factory=dict)
    """Of the dimensions of rewards, where the role has its own."""
    baseline: float = 0.0
    """Of advantage ema."""


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How rewards become weighted rows."""

    gamma: float = 1.0
    turn_gamma: float = 1.0
    overlong: Overlong | None = None
    advantage: AdvantageName = "grpo"
    scale_rewards: Scale = "group"
    k: int = 4
    rejection: Rejection | None = None
    """Train on what it keeps, each call with advantage 1, in place of comparing."""
    minibatches: int = 1
    loss_type: LossName | None = None
    """TRL's normalisation of this loss; None: each rollout weighs the same."""
    max_completion_length: int = 1
    """What dr_grpo divides by."""
    keeps_zero_advantage: bool = False
    """The loss has terms beside the advantage."""
    mask_truncated_completions: bool = False
    max_staleness: int | None = None
    max_row_tokens: int | None = None
    """Longest row; calls that end beyond it are left out."""
    vocabulary: int | None = None
    """How many tokens the policy knows."""
    is_tempered: bool = False
    """Logprobs were recorded after the division by the temperature."""

    def estimate(self, credits: Tensor, group_ids: Sequence[str], baseline: float) -> Estimate:
        options = {"grpo": {"scale_rewards": self.scale_rewards}, "max@k": {"k": self.k}, "ema": {"baseline": baseline}}
        return estimate(self.advantage, credits, group_ids, **options.get(self.advantage, {}))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a step does with a call: the advantage it trains with, or why it does not."""

    call: Call
    advantage: float | None
    reason: DropReason | None = None
    minibatch: int = 0
    weight: float | None = None
    """Factor on the loss of each of its tokens."""


@dataclass(slots=True)
class GrpoBatch:
    """The rows of a step by role, and a verdict on every call of its trajectories."""

    rows: dict[str, list[SampledRow]] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    credits: dict[str, list[float]] = field(default_factory=dict)
    """For each role that trains, what it earned in each rollout that counts."""

    def dropped(self) -> dict[str, int]:
        """How many calls do not train, by reason."""
        counts: dict[str, int] = {}
        for verdict in self.verdicts:
            if verdict.reason is not None:
                counts[verdict.reason] = counts.get(verdict.reason, 0) + 1
        return counts

    def minibatches(self, roles: Sequence[str]) -> dict[int, list[SampledRow]]:
        """The rows of `roles`, which share an adapter, by the number of the optimizer step that they belong to."""
        rows = [row for role in roles for row in self.rows.get(role, ())]
        return {
            number: [row for row in rows if row.minibatch == number] for number in sorted({r.minibatch for r in rows})
        }

    def skip(self, roles: Sequence[str], minibatch: int) -> None:
        """Say of the calls of `roles` in `minibatch` that their optimizer step was not taken."""
        self.verdicts = [
            replace(verdict, advantage=None, weight=None, reason=DropReason.SKIPPED_STEP)
            if verdict.reason is None and verdict.minibatch == minibatch and verdict.call.role in roles
            else verdict
            for verdict in self.verdicts
        ]


def grpo_batch(
    trajectories: Sequence[Trajectory],
    roles: Mapping[str, RoleState],
    options: BatchOptions,
    *,
    replaced_groups: frozenset[str] = frozenset(),
) -> GrpoBatch:
    """Training rows for `roles`. A failed rollout, or one without a reward, is left out of its group."""
    batch = GrpoBatch()
    weights = {role: state.weights for role, state in roles.items() if state.weights}
    members = []
    for trajectory in trajectories:
        batch.verdicts.extend(Verdict(drop.call, None, drop.reason) for drop in trajectory.drops)
        credits = call_credits(
            trajectory, options.gamma, turn_gamma=options.turn_gamma, weights=weights, overlong=options.overlong
        )
        members.append(_Member(trajectory, credits, trajectory.group_id in replaced_groups))
    for role in dict.fromkeys(row.role for trajectory in trajectories for row in trajectory.rows):
        _RoleBatch(batch, role, roles.get(role), options).add(members)
    return batch


def zero_variance_groups(
    trajectories: Sequence[Trajectory], roles: Mapping[str, RoleState], options: BatchOptions
) -> list[str]:
    """Ids of the groups of which no call would train for want of a difference (DAPO, arXiv 2503.14476, section 3.2)."""
    ids = dict.fromkeys(trajectory.group_id or trajectory.rollout_id for trajectory in trajectories)
    found = []
    for group_id in ids:
        own = [made for made in trajectories if (made.group_id or made.rollout_id) == group_id]
        batch = grpo_batch(own, roles, replace(options, advantage="dr_grpo", keeps_zero_advantage=False))
        if not any(verdict.reason is None for verdict in batch.verdicts):
            found.append(group_id)
    return found


@dataclass(frozen=True, slots=True)
class _Member:
    """A rollout of its group, with the credit of its calls."""

    trajectory: Trajectory
    credits: Mapping[str, Credit | None]
    is_replaced: bool

    @property
    def group_id(self) -> str:
        return self.trajectory.group_id or self.trajectory.rollout_id

    def rows(self, role: str) -> list[Row]:
        return [row for row in self.trajectory.rows if row.role == role]

    def calls(self, role: str) -> list[Call]:
        return [turn.call for row in self.rows(role) for turn in row.turns]

    def earned(self, role: str) -> list[Credit]:
        """The credits of the role's calls that a reward reaches."""
        return [credit for call in self.calls(role) if (credit := self.credits[call.span_id]) is not None]

    def fault(self) -> DropReason | None:
        """Why no call of this rollout counts."""
        if self.trajectory.error is not None:
            return DropReason.FAILED_ROLLOUT
        return DropReason.REPLACED_GROUP if self.is_replaced else None


@dataclass(frozen=True, slots=True)
class _RoleBatch:
    """What one role did in a step, on its way into the batch."""

    batch: GrpoBatch
    role: str
    state: RoleState | None
    """None: the role is not known."""
    options: BatchOptions

    def add(self, members: Sequence[_Member]) -> None:
        present = [member for member in members if member.rows(self.role)]
        rewarded = []
        for member in present:
            reason = self._not_trained() or member.fault()
            if reason is None and member.earned(self.role):
                rewarded.append(member)
            else:
                reason = reason or DropReason.NO_REWARD
                self.batch.verdicts.extend(Verdict(call, None, reason) for call in member.calls(self.role))
        if rewarded:
            self._add_rewarded(rewarded)

    def _not_trained(self) -> DropReason | None:
        if self.state is None:
            return DropReason.ROLE_NOT_TRAINED
        return None if self.state.trains else DropReason.ROLE_FROZEN

    def _add_rewarded(self, members: Sequence[_Member]) -> None:
        assert self.state is not None, "a role that is not known has no member"
        group_ids = [member.group_id for member in members]
        credits = [role_credit(member.earned(self.role)) for member in members]
        self.batch.credits[self.role] = credits
        found = self.options.estimate(torch.tensor(credits, dtype=torch.float64), group_ids, self.state.baseline)
        scales = self._call_scales(members, found)
        groups = list(dict.fromkeys(group_ids))
        numbers = [groups.index(group) % self.options.minibatches for group in group_ids]
        kept = self.options.rejection.kept(credits, group_ids) if self.options.rejection else [True] * len(members)
        drafts = []
        for place, member in enumerate(members):
            if kept[place]:
                drafts += self._drafts(member, found.advantages[place].item(), scales[place], numbers[place])
            else:
                calls = member.calls(self.role)
                self.batch.verdicts.extend(Verdict(call, None, DropReason.REJECTED) for call in calls)
        for number in sorted({draft.minibatch for draft in drafts}):
            self._weigh([draft for draft in drafts if draft.minibatch == number])

    def _call_scales(self, members: Sequence[_Member], found: Estimate) -> list[float]:
        """What the rewards on single calls are divided by, for each rollout."""
        if found.deviations is None:
            return [1.0] * len(members)
        own = [[credit.own for credit in member.earned(self.role)] for member in members]
        within = [sum((value - sum(values) / len(values)) ** 2 for value in values) / len(values) for values in own]
        scales = [0.0] * len(members)
        for places in self._scaled_together(members):
            spread = sum(within[place] for place in places) / len(places)
            for place in places:
                scales[place] = math.sqrt(float(found.deviations[place]) ** 2 + spread) + EPSILON
        return scales

    def _scaled_together(self, members: Sequence[_Member]) -> list[list[int]]:
        """Places of the rollouts that have one standard deviation."""
        by_group = self.options.advantage == "grpo" and self.options.scale_rewards == "group"
        ids = [member.group_id if by_group else "batch" for member in members]
        return [places.tolist() for places in group_members(ids)]

    def _drafts(self, member: _Member, advantage: float, scale: float, minibatch: int) -> "list[_Draft]":
        """A draft of each row of `member`, its calls judged."""
        earned = member.earned(self.role)
        mean_own = sum(credit.own for credit in earned) / len(earned)
        mean_discount = sum(credit.discount for credit in earned) / len(earned)
        drafts = []
        for row in member.rows(self.role):
            draft = _Draft(row, minibatch, [0] * len(row.ids), [0.0] * len(row.ids))
            is_known = self.options.vocabulary is None or max(row.ids) < self.options.vocabulary
            for turn in row.turns:
                credit = member.credits[turn.call.span_id]
                reason = self._turn_fault(turn, credit) if is_known else DropReason.UNKNOWN_TOKENS
                if credit is None or reason is not None:
                    draft.verdicts.append(Verdict(turn.call, None, reason))
                    continue
                share = credit.discount / mean_discount if mean_discount else 1.0
                of_call = advantage * share + (credit.own - mean_own) / scale
                if self.options.rejection is not None:
                    of_call = 1.0
                draft.mask[turn.start : turn.end] = [1] * (turn.end - turn.start)
                if abs(of_call) < _NOTHING and not self.options.keeps_zero_advantage:
                    draft.verdicts.append(Verdict(turn.call, None, DropReason.ZERO_ADVANTAGE))
                    continue
                draft.advantages[turn.start : turn.end] = [of_call] * (turn.end - turn.start)
                draft.verdicts.append(Verdict(turn.call, of_call, minibatch=minibatch))
            drafts.append(draft)
        return drafts

    def _turn_fault(self, turn: Turn, credit: Credit | None) -> DropReason | None:
        call = turn.call
        if credit is None:
            return DropReason.NO_REWARD
        if self.options.max_row_tokens is not None and turn.end > self.options.max_row_tokens:
            return DropReason.TOO_LONG
        bound, version = self.options.max_staleness, version_number(call.policy_version)
        now = self.state.version if self.state else None
        if bound is not None and version is not None and now is not None and now - version > bound:
            return DropReason.STALE
        if self.options.mask_truncated_completions and call.finish_reason == "length":
            return DropReason.TRUNCATED
        return None

    def _weigh(self, drafts: "Sequence[_Draft]") -> None:
        """Add the rows of one optimizer step that train, weighted among all of them."""
        lengths = torch.tensor([sum(draft.mask) for draft in drafts])
        if self.options.loss_type is None:
            weights = rollout_weights(lengths, [draft.row.rollout_id for draft in drafts])
        else:
            weights = batch_weights(self.options.loss_type, lengths, self.options.max_completion_length)
        for draft, weight in zip(drafts, weights.tolist(), strict=True):
            self.batch.verdicts.extend(draft.weighted(weight))
            if draft.trains:
                row = draft.to_row(weight, is_tempered=self.options.is_tempered)
                self.batch.rows.setdefault(self.role, []).append(row)


@dataclass(slots=True)
class _Draft:
    """A row whose calls are judged, before it has a weight."""

    row: Row
    minibatch: int
    mask: list[int]
    advantages: list[float]
    verdicts: list[Verdict] = field(default_factory=list)
    """On each of its calls."""

    @property
    def trains(self) -> bool:
        return any(verdict.reason is None for verdict in self.verdicts)

    def weighted(self, weight: float) -> list[Verdict]:
        """The verdicts, with the weight of this row on those that train."""
        return [replace(verdict, weight=weight) if verdict.reason is None else verdict for verdict in self.verdicts]

    def to_row(self, weight: float, *, is_tempered: bool) -> SampledRow:
        """The row up to the last token that counts: what comes after it changes nothing."""
        end = len(self.mask) - self.mask[::-1].index(1)
        temperatures = None
        if is_tempered:
            temperatures = [1.0] * len(self.mask)
            for turn in self.row.turns:
                # A greedy engine divides by nothing.
                temperatures[turn.start : turn.end] = [turn.call.temperature or 1.0] * (turn.end - turn.start)
        return SampledRow(
            self.row.ids[:end],
            self.mask[:end],
            weight,
            self.row.logprobs[:end],
            self.advantages[:end],
            self.minibatch,
            temperatures=temperatures[:end] if temperatures else None,
        )


def version_number(version: str | None) -> int | None:
    """`3` of `writer@3`; None where it names none."""
    number = (version or "").rpartition("@")[2]
    return int(number) if number.isdigit() else None
