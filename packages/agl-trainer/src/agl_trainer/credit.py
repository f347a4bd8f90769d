"""Credit: what each call of a rollout earned.

A reward on the rollout reaches a call multiplied by gamma for each hand-off between roles that came after the call. A
reward on a role is that role's own and is not discounted. A reward on one call is added to that call alone.

    credit(c) = gamma^h(c) * R_rollout    or  R_role(c)  where the role has a reward of its own
              + sum of the rewards on c

With one role and one reward on the rollout, credit is that reward: plain GRPO.
"""

from collections.abc import Sequence
from itertools import pairwise

from agl.trajectory import Call, Reward, Trajectory


def call_credits(trajectory: Trajectory, gamma: float) -> dict[str, float | None]:
    """Credit of each call of the last attempt by its span id; None where no reward reaches it.

    Calls are taken in the order of time; `gamma` is in [0, 1].
    """
    calls = [call for call in trajectory.calls if call.attempt_id in (None, trajectory.attempt_id)]
    handoffs = _handoffs_after(calls)
    return {
        call.span_id: _credit(call, trajectory.rewards, gamma**after)
        for call, after in zip(calls, handoffs, strict=True)
    }


def role_credit(credits: Sequence[float]) -> float:
    """What a role earned in a rollout: the mean over its calls, so that many calls count as one rollout."""
    return sum(credits) / len(credits)


def _handoffs_after(calls: Sequence[Call]) -> list[int]:
    """For each call, how often the role changes between it and the end."""
    changes = [before.role != after.role for before, after in pairwise(calls)]
    return [sum(changes[index:]) for index in range(len(calls))]


def _credit(call: Call, rewards: Sequence[Reward], discount: float) -> float | None:
    own = [reward.value for reward in call.rewards]
    of_role = [reward.value for reward in rewards if reward.target is None and reward.role == call.role]
    of_rollout = [reward.value for reward in rewards if reward.target is None and reward.role is None]
    if of_role:
        return of_role[-1] + sum(own)
    if of_rollout:
        return discount * of_rollout[-1] + sum(own)
    return sum(own) if own else None
