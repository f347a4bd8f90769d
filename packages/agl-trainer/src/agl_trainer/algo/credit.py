"""Credit: the reward that each call of a rollout earned.

A reward on the rollout is credited to a call times gamma for each hand-off between roles, and times turn_gamma for each
call, on the longest path of calls that follow it; see `succession`. A reward on a role is credited to the role's calls
without a discount. A reward on a call is added to that call only.

    credit(c) = gamma^h(c) * turn_gamma^n(c) * R_rollout    or  R_role(c)  if the role has a reward of its own
              + sum of the rewards on c  + penalty of an overlong response

A negative R_rollout is not discounted: a mistake would look better for the hand-offs after it. With one role, one
reward on the rollout and turn_gamma 1, credit is that reward: plain GRPO.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from agl.trajectory import Call, Reward, Trajectory
from agl_trainer.algo.succession import distances

Weights = Mapping[str, float]
"""Reward dimension to its weight."""
_NO_WEIGHTS: Mapping[str, Weights] = MappingProxyType({})
PLAIN, OVERLONG = "reward", "overlong"
"""Dimensions in `dimension_credits` of a reward that is a plain number, and of the penalty of overlong responses."""


@dataclass(frozen=True, slots=True)
class Credit:
    """The reward of a call's rollout or role, the factor with which the call shares it, and the call's own rewards."""

    shared: float
    own: float
    discount: float = 1.0

    @property
    def total(self) -> float:
        return self.discount * self.shared + self.own

    @property
    def size(self) -> float:
        """The largest amount in it, of which rounding errors are a share."""
        return max(abs(self.shared), abs(self.own))


@dataclass(frozen=True, slots=True)
class OverlongPenalty:
    """Soft penalty of overlong responses (DAPO, arXiv 2503.14476, eq. 13); lengths in tokens."""

    max_tokens: int
    buffer: int
    penalty: float = 1.0

    def of(self, call: Call) -> float:
        """0 up to max_tokens - buffer, then linear to -penalty at max_tokens; -penalty for a truncated response."""
        length = len(call.response_ids or ())
        excess = length - (self.max_tokens - self.buffer)
        share = 1.0 if call.finish_reason == "length" else min(max(excess / self.buffer, 0.0), 1.0)
        return -self.penalty * share


def call_credits(
    trajectory: Trajectory,
    gamma: float,
    *,
    turn_gamma: float = 1.0,
    weights: Mapping[str, Weights] = _NO_WEIGHTS,
    overlong: OverlongPenalty | None = None,
) -> dict[str, Credit | None]:
    """Span id of each call of the last attempt to its credit; None if no reward reaches the call.

    `gamma` and `turn_gamma` are in [0, 1]. `weights` holds the roles that weigh reward dimensions differently from the
    configuration; a dimension that a role does not name has weight 0 there.
    """
    credits: dict[str, Credit | None] = {}
    for call, discount in _discounts(trajectory, gamma, turn_gamma):
        credit = _credit(call, trajectory.rewards, discount, partial(_value, weights=weights.get(call.role, {})))
        if credit is not None and overlong is not None:
            credit = Credit(credit.shared, credit.own + overlong.of(call), credit.discount)
        credits[call.span_id] = credit
    return credits


def dimension_credits(
    trajectory: Trajectory, gamma: float, *, turn_gamma: float = 1.0, overlong: OverlongPenalty | None = None
) -> dict[str, dict[str, Credit]]:
    """For each reward dimension the credits of `call_credits`, of the calls that the dimension reaches.

    A reward that is a plain number has the dimension PLAIN, the penalty of overlong responses the dimension OVERLONG.
    """
    rewards = [*trajectory.rewards, *(reward for call in trajectory.calls for reward in call.rewards)]
    names = dict.fromkeys(name for reward in rewards for name in _dimensions(reward))
    found: dict[str, dict[str, Credit]] = {name: {} for name in names} | ({OVERLONG: {}} if overlong else {})
    for call, discount in _discounts(trajectory, gamma, turn_gamma):
        for name in names:
            credit = _credit(
                call, trajectory.rewards, discount, lambda reward, name=name: _dimensions(reward).get(name)
            )
            if credit is not None:
                found[name][call.span_id] = credit
                if overlong is not None:
                    found[OVERLONG][call.span_id] = Credit(0.0, overlong.of(call))
    return found


def role_credit(credits: Sequence[Credit]) -> float:
    """Credit of a role in a rollout: the mean over its calls, so that many calls count as one rollout."""
    return sum(credit.total for credit in credits) / len(credits)


def undiscounted_credit(credits: Sequence[Credit]) -> float:
    """`role_credit` without discounts."""
    return sum(credit.shared + credit.own for credit in credits) / len(credits)


def _discounts(trajectory: Trajectory, gamma: float, turn_gamma: float) -> list[tuple[Call, float]]:
    """The calls of the last attempt, each with the discount of the rollout's reward."""
    calls = [call for call in trajectory.calls if call.attempt_id in (None, trajectory.attempt_id)]
    return [
        (call, gamma**after.handoffs * turn_gamma**after.calls)
        for call, after in zip(calls, distances(calls), strict=True)
    ]


def _credit(
    call: Call, rewards: Sequence[Reward], discount: float, value_of: Callable[[Reward], float | None]
) -> Credit | None:
    """Credit of `call`; `value_of` is None for a reward that does not count."""
    own = [value for reward in call.rewards if (value := value_of(reward)) is not None]
    of_role = [reward for reward in rewards if reward.target is None and reward.role == call.role]
    of_rollout = [reward for reward in rewards if reward.target is None and reward.role is None]
    last = (of_role or of_rollout)[-1:]
    shared = value_of(last[0]) if last else None
    if shared is None:
        return Credit(0.0, sum(own)) if own else None
    return Credit(shared, sum(own), 1.0 if of_role or shared < 0 else discount)


def _dimensions(reward: Reward) -> Mapping[str, float]:
    return reward.dimensions or {PLAIN: reward.value}


def _value(reward: Reward, weights: Weights) -> float:
    """The scalar of `reward`: its dimensions under the role's own weights, if both exist, else its value."""
    if not weights or not reward.dimensions:
        return reward.value
    return math.fsum(weights.get(name, 0.0) * part for name, part in reward.dimensions.items())
