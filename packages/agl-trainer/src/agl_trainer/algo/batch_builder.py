"""Builds the batch of a GRPO step from trajectories: advantages by role and rollout, weighted rows, call outcomes.

    G_r = mean over the role's calls in rollout r of their credit; see `credit`
    A_r = advantage of G_r among the rollouts of its group; see `advantages`
    A_c = advantage of call c of r; see `call_advantages`

Rows are weighted over an optimizer step; see `normalization`. The groups of a training step may be split over several
optimizer steps, its minibatches (PPO, arXiv 1707.06347, algorithm 1).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from agl.trajectory import Call, DropReason, Row, Trajectory, Turn, sampling_fault
from agl_trainer.algo.batch import CallOutcome, GrpoBatch, version_number
from agl_trainer.algo.call_advantages import (
    CallAdvantage,
    CallCredits,
    RolloutAdvantage,
    call_advantages,
    gdpo_call_advantages,
)
from agl_trainer.algo.credit import OVERLONG, PLAIN, Credit, call_credits, dimension_credits, role_credit
from agl_trainer.algo.normalization import row_weights
from agl_trainer.algo.options import BatchOptions, RoleState
from agl_trainer.data.rows import SampledRow
from agl_trainer.data.truncation import Truncation


def grpo_batch(
    trajectories: Sequence[Trajectory],
    roles: Mapping[str, RoleState],
    options: BatchOptions,
    *,
    replaced_groups: frozenset[str] = frozenset(),
) -> GrpoBatch:
    """The batch of a step for `roles`. A failed rollout, or one without a reward, is not a member of its group."""
    weights = {role: state.weights for role, state in roles.items() if state.weights}
    credits = [
        call_credits(made, options.gamma, turn_gamma=options.turn_gamma, weights=weights, overlong=options.overlong)
        for made in trajectories
    ]
    by_dimension: Sequence[Mapping[str, CallCredits]] = [{}] * len(trajectories)
    if options.loss.advantage == "gdpo":
        by_dimension = [
            dimension_credits(made, options.gamma, turn_gamma=options.turn_gamma, overlong=options.overlong)
            for made in trajectories
        ]
    batch = GrpoBatch()
    batch.outcomes += [CallOutcome(drop.call, None, drop.reason) for made in trajectories for drop in made.drops]
    trainable: set[str] = set()
    for role in dict.fromkeys(row.role for made in trajectories for row in made.rows):
        builder = _RoleBuilder(batch, role, roles.get(role), options, trainable)
        parts = [
            _RolePart.of(role, *each, options.represented)
            for each in zip(trajectories, credits, by_dimension, strict=True)
        ]
        builder.add([part for part in parts if part.rows], replaced_groups)
    groups = dict.fromkeys(_group_of(made) for made in trajectories)
    batch.zero_variance_groups = [group for group in groups if group not in trainable]
    return batch


def _group_of(trajectory: Trajectory) -> str:
    """A rollout without a group is a group of its own."""
    return trajectory.group_id or trajectory.rollout_id


@dataclass(frozen=True, slots=True)
class _RolePart:
    """The calls of one role in one rollout."""

    group_id: str
    has_failed: bool
    rows: list[Row]
    credits: Mapping[str, Credit | None]
    """Span id to the credit of the call."""
    rewarded: CallCredits
    """Credits of the calls that a reward reaches."""
    by_dimension: Mapping[str, CallCredits]
    """For advantage gdpo, the same of each reward dimension."""
    represented: float
    """How many rollouts it stands for, relative to the mean of the store: those like it that sampling left out too."""

    @classmethod
    def of(
        cls,
        role: str,
        trajectory: Trajectory,
        credits: Mapping[str, Credit | None],
        by_dimension: Mapping[str, CallCredits],
        mean_represented: float,
    ) -> "_RolePart":
        rows = [row for row in trajectory.rows if row.role == role]
        ids = [turn.call.span_id for row in rows for turn in row.turns]
        rewarded = {span_id: credit for span_id in ids if (credit := credits[span_id]) is not None}
        of_role = {
            name: {span_id: found[span_id] for span_id in ids if span_id in found}
            for name, found in by_dimension.items()
        }
        represented = 1 / trajectory.inclusion / mean_represented
        has_failed = trajectory.error is not None
        return cls(_group_of(trajectory), has_failed, rows, credits, rewarded, of_role, represented)

    def drop(self, reason: DropReason) -> Iterator[CallOutcome]:
        """Outcomes of the calls when none of them trains."""
        return (CallOutcome(turn.call, None, reason) for row in self.rows for turn in row.turns)


@dataclass(slots=True)
class _RowDraft:
    """A row with the outcomes of its calls, before it has a weight."""

    row: Row
    minibatch: int
    represented: float
    mask: list[int]
    advantages: list[float]
    outcomes: list[CallOutcome] = field(default_factory=list)
    calls: dict[str, range] = field(default_factory=dict)
    """Positions of the tokens of each call that trains."""

    def train_on(self, turn: Turn, advantage: float) -> None:
        length = turn.end - turn.start
        self.advantages[turn.start : turn.end] = [advantage] * length
        self.calls[turn.call.span_id] = range(turn.start, turn.end)
        self.outcomes.append(CallOutcome(turn.call, advantage, minibatch=self.minibatch))

    def drop(self, call: Call, reason: DropReason) -> None:
        self.outcomes.append(CallOutcome(call, None, reason))

    @property
    def trains(self) -> bool:
        return any(outcome.reason is None for outcome in self.outcomes)

    def weighted_outcomes(self, weight: float) -> Iterator[CallOutcome]:
        """The outcomes, with the weight of the row if the call trains."""
        return (replace(one, weight=weight) if one.reason is None else one for one in self.outcomes)

    def to_row(self, weight: float, options: BatchOptions) -> SampledRow:
        """The row up to its last trained token: later tokens do not change the loss.

        Logprobs that are not those of the distribution that the engine sampled from are NaN.
        """
        end = len(self.mask) - self.mask[::-1].index(1)
        temperatures, logprobs = [1.0] * len(self.mask), list(self.row.logprobs)
        for turn in self.row.turns if options.rejection is None else ():
            # Temperature 0 is greedy: the engine divides by nothing.
            temperatures[turn.start : turn.end] = [turn.call.temperature or 1.0] * (turn.end - turn.start)
            if not options.has_logprobs(turn.call):
                logprobs[turn.start : turn.end] = [math.nan] * (turn.end - turn.start)
        return SampledRow(
            self.row.ids[:end],
            self.mask[:end],
            weight,
            logprobs[:end],
            self.advantages[:end],
            self.minibatch,
            temperatures=None if set(temperatures) == {1.0} else temperatures[:end],
            truncation=Truncation(**options.sampling) if options.rejection is None else Truncation(),
            calls=self.calls,
        )


@dataclass(frozen=True, slots=True)
class _RoleBuilder:
    """Adds the rows and outcomes of one role to `batch`."""

    batch: GrpoBatch
    role: str
    state: RoleState | None
    """None: the configuration does not have the role."""
    options: BatchOptions
    trainable: set[str]
    """Groups in which some call could train; the builder adds to it."""

    def add(self, parts: Sequence[_RolePart], replaced_groups: frozenset[str]) -> None:
        members = []
        for part in parts:
            if (reason := self._drop_reason(part, replaced_groups)) is None:
                members.append(part)
            else:
                self.batch.outcomes += part.drop(reason)
        if members and self.state is not None:
            drafts = self._drafts(members, self.state)
            for number in sorted({draft.minibatch for draft in drafts}):
                self._add_weighted([draft for draft in drafts if draft.minibatch == number])

    def _drop_reason(self, part: _RolePart, replaced_groups: frozenset[str]) -> DropReason | None:
        """Why the role does not train on a rollout at all."""
        if self.state is None:
            return DropReason.ROLE_NOT_TRAINED
        if not self.state.trains:
            return DropReason.ROLE_FROZEN
        if part.has_failed:
            return DropReason.FAILED_ROLLOUT
        if part.group_id in replaced_groups:
            return DropReason.REPLACED_GROUP
        return None if part.rewarded else DropReason.NO_REWARD

    def _drafts(self, members: Sequence[_RolePart], state: RoleState) -> list[_RowDraft]:
        """Rows of all members, with the advantages of their calls."""
        group_ids = [member.group_id for member in members]
        credits = [role_credit([*member.rewarded.values()]) for member in members]
        self.batch.credits[self.role] = credits
        self.batch.represented[self.role] = [member.represented for member in members]
        advantages = self._advantages(members, group_ids, state)
        groups = list(dict.fromkeys(group_ids))
        kept = self.options.rejection.kept(credits, group_ids) if self.options.rejection else [True] * len(members)
        drafts = []
        for index, member in enumerate(members):
            if not kept[index]:
                self.batch.outcomes += member.drop(DropReason.REJECTED)
                continue
            minibatch = groups.index(member.group_id) % self.options.minibatches
            drafts += self._member_drafts(member, advantages[index].calls, minibatch)
        return drafts

    def _advantages(
        self, members: Sequence[_RolePart], group_ids: Sequence[str], state: RoleState
    ) -> list[RolloutAdvantage]:
        loss, weights = self.options.loss, state.weights or self.options.reward_weights
        represented = torch.tensor([member.represented for member in members], dtype=torch.float64)
        if loss.advantage != "gdpo":
            credits = [member.rewarded for member in members]
            return call_advantages(credits, group_ids, loss, represented, state.baseline)
        dimensions = [
            (
                weights.get(name, float(not weights or name in (PLAIN, OVERLONG))),
                [member.by_dimension.get(name, {}) for member in members],
            )
            for name in dict.fromkeys(name for member in members for name in member.by_dimension)
        ]
        return gdpo_call_advantages(dimensions, group_ids, represented)

    def _member_drafts(
        self, member: _RolePart, advantages: Mapping[str, CallAdvantage], minibatch: int
    ) -> Iterator[_RowDraft]:
        """A draft of each row of `member`, whose calls have `advantages` by span id."""
        rejects, size = self.options.rejection is not None, self.state.vocabulary_size if self.state else None
        for row in member.rows:
            draft = _RowDraft(row, minibatch, member.represented, [0] * len(row.ids), [0.0] * len(row.ids))
            has_unknown_tokens = size is not None and max(row.ids) >= size
            for turn in row.turns:
                found = advantages.get(turn.call.span_id, CallAdvantage(0.0, trains=False, differs=False))
                reason = self._call_drop_reason(turn, member.credits[turn.call.span_id])
                if reason is None and (rejects or found.differs):
                    self.trainable.add(member.group_id)
                if has_unknown_tokens:
                    reason = DropReason.UNKNOWN_TOKENS
                if reason is not None:
                    draft.drop(turn.call, reason)
                    continue
                draft.mask[turn.start : turn.end] = [1] * (turn.end - turn.start)
                if rejects or found.trains or self.options.loss.trains_without_advantage:
                    draft.train_on(turn, 1.0 if rejects else found.value)
                else:
                    draft.drop(turn.call, DropReason.ZERO_ADVANTAGE)
            yield draft

    def _call_drop_reason(self, turn: Turn, credit: Credit | None) -> DropReason | None:
        """Why a call of a rollout that trains does not train."""
        if credit is None:
            return DropReason.NO_REWARD
        if self.options.rejection is None and (reason := self._sampling_drop_reason(turn.call)):
            return reason
        limit, loss = self.state.max_row_tokens if self.state else None, self.options.loss
        if limit is not None and turn.end > limit:
            return DropReason.TOO_LONG
        if loss.max_staleness is not None and (self._staleness(turn.call) or 0) > loss.max_staleness:
            return DropReason.STALE
        if loss.mask_truncated_completions and turn.call.finish_reason == "length":
            return DropReason.TRUNCATED
        return None

    def _sampling_drop_reason(self, call: Call) -> DropReason | None:
        """Why the policy gradient of `call` would be biased."""
        if fault := sampling_fault(call, self.options.sampling):
            return fault[0]
        if not self.options.from_store and self._staleness(call) == 0:
            return None
        if not self.options.has_logprobs(call):
            return DropReason.RAW_LOGPROBS
        return DropReason.STALE if self.options.sampling else None

    def _staleness(self, call: Call) -> int | None:
        """Versions between the policy that sampled `call` and the current one, if both are known."""
        sampled_by, current = version_number(call.policy_version), self.state.version if self.state else None
        return None if sampled_by is None or current is None else current - sampled_by

    def _add_weighted(self, drafts: Sequence[_RowDraft]) -> None:
        """Add the rows of one optimizer step, with weights that are normalised over all of them."""
        loss = self.options.loss
        lengths = torch.tensor([sum(draft.mask) for draft in drafts])
        rollout_ids = [draft.row.rollout_id for draft in drafts]
        represented = torch.tensor([draft.represented for draft in drafts], dtype=torch.float64)
        weights = row_weights(loss.effective_normalization, lengths, rollout_ids, self.options.max_tokens, represented)
        for draft, weight in zip(drafts, weights.tolist(), strict=True):
            self.batch.outcomes += draft.weighted_outcomes(weight)
            if draft.trains:
                row = draft.to_row(weight, self.options)
                self.batch.rows.setdefault(self.role, []).append(row)
