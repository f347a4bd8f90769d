"""Credit: the reward that each call of a rollout earned.

A reward on the rollout is credited to a call times gamma for each later hand-off between roles, and times turn_gamma
for each later call. A reward on a role is credited to the role's calls without a discount. A reward on a call is added
to that call only.

    credit(c) = gamma^h(c) * turn_gamma^n(c) * R_rollout    or  R_role(c)  if the role has a reward of its own
              + sum of the rewards on c  + penalty of an overlong response

With one role, one reward on the rollout and turn_gamma 1, credit is that reward: plain GRPO.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

from agl.emit.reward import weighted_sum
from agl.trajectory import Call, Reward, Trajectory

Weights = Mapping[str, float]
"""Reward dimension to its weight."""
_NO_WEIGHTS: Mapping[str, Weights] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Credit:
    """A call's share of the reward on its rollout or role, and the rewards on the call itself."""

    shared: float
    own: float
    discount: float = 1.0
    """Factor that `shared` includes."""

    @property
    def total(self) -> float:
        return self.shared + self.own


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

    Calls are ordered by time; `gamma` and `turn_gamma` are in [0, 1]. `weights` holds the roles that weigh reward
    dimensions differently from the configuration. Raises TelemetryError for a dimension without a weight.
    """
    calls = [call for call in trajectory.calls if call.attempt_id in (None, trajectory.attempt_id)]
    handoffs = _handoffs_after(calls)
    credits: dict[str, Credit | None] = {}
    for index, (call, after) in enumerate(zip(calls, handoffs, strict=True)):
        discount = gamma**after * turn_gamma ** (len(calls) - 1 - index)
        credit = _credit(call, trajectory.rewards, discount, weights.get(call.role, {}))
        if credit is not None and overlong is not None:
            credit = Credit(credit.shared, credit.own + overlong.of(call), credit.discount)
        credits[call.span_id] = credit
    return credits


def role_credit(credits: Sequence[Credit]) -> float:
    """Credit of a role in a rollout: the mean over its calls, so that many calls count as one rollout."""
    return sum(credit.total for credit in credits) / len(credits)


def _handoffs_after(calls: Sequence[Call]) -> list[int]:
    """For each call, the number of role changes from it to the end."""
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
    """The scalar of `reward`: its dimensions under the role's own weights, if both exist, else its value."""
    return weighted_sum(reward.dimensions, weights) if weights and reward.dimensions else reward.value
