"""GRPO over trajectories: advantages per role at rollout level, rows with a weight, and the account of every call.

    A_c = (credit_c - mean_g) / scale     mean over the role's credits of the rollouts of group g; see `advantages`
    loss = sum over rows and tokens of  -min(rho A, clip(rho) A) / (T_r N)

T_r: trained tokens of the role in rollout r; N: rollouts of the optimizer step in which the role has credit. So a
rollout with many calls weighs as much as one with few, and cutting a rollout into more rows changes nothing. The
groups of a step may be dealt out to several optimizer steps, its minibatches (PPO, arXiv 1707.06347, algorithm 1).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from agl.trajectory import Call, DropReason, Row, Trajectory
from agl_trainer.advantages import Scale, group_baselines
from agl_trainer.batch import SampledRow
from agl_trainer.credit import call_credits, role_credit
from agl_trainer.logprobs import RowLogprobs
from agl_trainer.loss_options import LossOptions
from agl_trainer.losses import StepScale, TokenBatch, token_loss

_NOTHING = 1e-6
"""An advantage below this is the rounding of equal rewards."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a step does with a call: the advantage it trains with, or why it does not."""

    call: Call
    advantage: float | None
    reason: DropReason | None = None


@dataclass(slots=True)
class GrpoBatch:
    """The rows of a step by role, and a verdict on every call of its trajectories."""

    rows: dict[str, list[SampledRow]] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)

    def dropped(self) -> dict[str, int]:
        """How many calls do not train, by reason."""
        counts: dict[str, int] = {}
        for verdict in self.verdicts:
            if verdict.reason is not None:
                counts[verdict.reason] = counts.get(verdict.reason, 0) + 1
        return counts

    def minibatches(self, role: str) -> list[list[SampledRow]]:
        """The role's rows by the optimizer step that they belong to."""
        rows = self.rows[role]
        numbers = sorted({row.minibatch for row in rows})
        return [[row for row in rows if row.minibatch == number] for number in numbers]


def grpo_batch(
    trajectories: Sequence[Trajectory], roles: Sequence[str], *, gamma: float, scale: Scale, minibatches: int = 1
) -> GrpoBatch:
    """Training rows for `roles`. A failed rollout, or one without a reward, is left out of its group."""
    batch = GrpoBatch()
    for trajectory in trajectories:
        batch.verdicts.extend(Verdict(drop.call, None, drop.reason) for drop in trajectory.drops)
    members = [_Member(trajectory, call_credits(trajectory, gamma)) for trajectory in trajectories]
    for role in dict.fromkeys(row.role for trajectory in trajectories for row in trajectory.rows):
        _add_role(batch, role, members, scale if role in roles else None, minibatches)
    return batch


@dataclass(frozen=True, slots=True)
class _Member:
    """A rollout of its group, with the credit of its calls."""

    trajectory: Trajectory
    credits: Mapping[str, float | None]

    @property
    def group_id(self) -> str:
        return self.trajectory.group_id or self.trajectory.rollout_id

    def rows(self, role: str) -> list[Row]:
        return [row for row in self.trajectory.rows if row.role == role]

    def calls(self, role: str) -> list[Call]:
        return [turn.call for row in self.rows(role) for turn in row.turns]

    def credit(self, role: str) -> float | None:
        """The role's credit in this rollout; None where the rollout failed or a call of the role has no reward."""
        credits = [self.credits[call.span_id] for call in self.calls(role)]
        if self.trajectory.error is not None or not credits or None in credits:
            return None
        return role_credit([credit for credit in credits if credit is not None])


def _add_role(batch: GrpoBatch, role: str, members: Sequence[_Member], scale: Scale | None, minibatches: int) -> None:
    """Add what `role` did; `scale` None: it is not trained."""
    present = [member for member in members if member.rows(role)]
    rewarded = [member for member in present if member.credit(role) is not None]
    for member in present:
        if scale is None:
            _refuse(batch, member, role, DropReason.ROLE_NOT_TRAINED)
        elif member not in rewarded:
            failed = member.trajectory.error is not None
            _refuse(batch, member, role, DropReason.FAILED_ROLLOUT if failed else DropReason.NO_REWARD)
    if scale is not None and rewarded:
        credits = torch.tensor([member.credit(role) for member in rewarded], dtype=torch.float64)
        means, divisors = group_baselines(credits, [member.group_id for member in rewarded], scale)
        groups = list(dict.fromkeys(member.group_id for member in rewarded))
        numbers = [groups.index(member.group_id) % minibatches for member in rewarded]
        sizes = Counter(numbers)
        for member, mean, divisor, number in zip(rewarded, means.tolist(), divisors.tolist(), numbers, strict=True):
            _add_member(batch, role, member, mean, divisor, number, sizes[number])


def _refuse(batch: GrpoBatch, member: _Member, role: str, reason: DropReason) -> None:
    batch.verdicts.extend(Verdict(call, None, reason) for call in member.calls(role))


def _add_member(
    batch: GrpoBatch, role: str, member: _Member, mean: float, divisor: float, minibatch: int, rollouts: int
) -> None:
    """Add the rows of `member`, whose optimizer step, number `minibatch`, has so many `rollouts`."""
    tokens = sum(sum(row.loss_mask) for row in member.rows(role))
    for row in member.rows(role):
        advantages = [0.0] * len(row.token_ids)
        for turn in row.turns:
            credit = member.credits[turn.call.span_id]
            assert credit is not None, "a rewarded member has credit on every call of the role"
            earned = (credit - mean) / divisor
            if abs(earned) < _NOTHING:
                batch.verdicts.append(Verdict(turn.call, None, DropReason.ZERO_ADVANTAGE))
                continue
            batch.verdicts.append(Verdict(turn.call, earned))
            advantages[turn.start : turn.end] = [earned] * (turn.end - turn.start)
        if any(advantages):
            weight = 1 / (tokens * rollouts)
            sampled = SampledRow(row.token_ids, row.loss_mask, weight, row.logprobs, advantages, minibatch)
            batch.rows.setdefault(role, []).append(sampled)


def grpo_loss(epsilon: float, result: RowLogprobs, rows: Sequence[SampledRow]) -> tuple[Tensor, dict[str, float]]:
    """The clipped loss of the rows of one pass."""
    batch = TokenBatch(
        result.logprobs,
        _padded([row.trained(row.logprobs) for row in rows], result.logprobs),
        _padded([row.trained(row.advantages) for row in rows], result.logprobs),
        result.mask,
    )
    weights = result.logprobs.new_tensor([row.weight for row in rows])
    return token_loss(LossOptions(epsilon=epsilon), batch, StepScale(weights))


def _padded(values: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """[B, T], 0 where padded, of the type and on the device of `like`."""
    return pad_sequence([like.new_tensor(row) for row in values], batch_first=True)
