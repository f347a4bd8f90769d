"""Credit: what each call of a rollout earned.

A reward on the rollout reaches a call multiplied by gamma for each hand-off between roles that came after the call,
and by turn_gamma for each call after it. A reward on a role is that role's own and is not discounted. A reward on one
call is added to that call alone.

    credit(c) = gamma^h(c) * turn_gamma^n(c) * R_rollout    or  R_role(c)  where the role has a reward of its own
              + sum of the rewards on c  + the penalty of an answer that is too long

With one role and one reward on the rollout, and no turn_gamma, credit is that reward: plain GRPO.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

from agl.emit.reward import weighted_sum
from agl.trajectory import Call, Reward, Trajectory

Weights = Mapping[str, float]
_NONE: Mapping[str, Weights] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Credit:
    """What a call earned: its part of what it shares with other calls, and what is its own."""

    shared: float
    own: float
    discount: float = 1.0
    """Factor that is in `shared`."""

    @property
    def total(self) -> float:
        return self.shared + self.own


@dataclass(frozen=True, slots=True)
class Overlong:
    """Soft punishment of long answers (DAPO, arXiv 2503.14476, eq. 13), in tokens."""

    max_tokens: int
    buffer: int
    penalty: float = 1.0

    def of(self, call: Call) -> float:
        """0 up to max_tokens - buffer, then down to -penalty at max_tokens; -penalty also where the answer was cut."""
        length = len(call.response_ids or ())
        over = length - (self.max_tokens - self.buffer)
        share = 1.0 if call.finish_reason == "length" else min(max(over / self.buffer, 0.0), 1.0)
        return -self.penalty * share


def call_credits(
    trajectory: Trajectory,
    gamma: float,
    *,
    turn_gamma: float = 1.0,
    weights: Mapping[str, Weights] = _NONE,
    overlong: Overlong | None = None,
) -> dict[str, Credit | None]:
    """Credit of each call of the last attempt by its span id; None where no reward reaches it.

    Calls are taken in the order of time; `gamma` and `turn_gamma` are in [0, 1]. `weights` has, for a role that
    weighs the dimensions of rewards in its own way, its weights. Raises TelemetryError for a dimension without one.
    """
    calls = [call for call in trajectory.calls if call.attempt_id in (None, trajectory.attempt_id)]
    handoffs = _handoffs_after(calls)
    credits: dict[str, Credit | None] = {}
    for place, (call, after) in enumerate(zip(calls, handoffs, strict=True)):
        discount = gamma**after * turn_gamma ** (len(calls) - 1 - place)
        credit = _credit(call, trajectory.rewards, discount, weights.get(call.role, {}))
        if credit is not None and overlong is not None:
            credit = Credit(credit.shared, credit.own + overlong.of(call), credit.discount)
        credits[call.span_id] = credit
    return credits


def role_credit(credits: Sequence[Credit]) -> float:
    """What a role earned in a rollout: the mean over its calls, so that many calls count as one rollout."""
    return sum(credit.total for credit in credits) / len(credits)


def _handoffs_after(calls: Sequence[Call]) -> list[int]:
    """For each call, how often the role changes between it and the end."""
    changes = [before.role != after.role for before, after in pairwise(calls)]
    return [sum(changes[index:]) for index in range(len(calls))]


def _credit(call: Call, rewards: Sequence[Reward], discount: float, weights: Weights) -> Credit | None:
    own = [_value(reward, weights) for reward in call.rewards]
    of_role = [reward for reward in rewards if reward.target is None and reward.role == call.role]
    of_rollout = [reward for reward in rewards if reward.target is None and reward.role is None]
    if of_role:
        return Credit(_value(of_role[-1], weights), sum(own))
    if of_rollout:
        return Credit(discount * _value(of_rollout[-1], weights), sum(own), discount)
    return Credit(0.0, sum(own)) if own else None


def _value(reward: Reward, weights: Weights) -> float:
    """The scalar of `reward`; its dimensions under a role's own weights, where both are there."""
    return weighted_sum(reward.dimensions, weights) if weights and reward.dimensions else reward.value
