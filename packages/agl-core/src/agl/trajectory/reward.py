"""Rewards as spans carry them."""

from collections.abc import Iterable
from dataclasses import dataclass

from agl import semconv
from agl.span import Span
from agl.trajectory.aliases import read_number

_NOT_DIMENSIONS = {semconv.REWARD_VALUE, semconv.REWARD_TARGET}


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward as it was emitted: on one call (`target`), on a role, or, with neither, on the rollout."""

    value: float
    dimensions: dict[str, float]
    target: str | None
    """Response id or span id."""
    role: str | None


def collect_rewards(spans: Iterable[Span]) -> list[Reward]:
    """The rewards that `spans` carry, in their order."""
    return [_to_reward(span, value) for span in spans if (value := read_number(span, semconv.REWARD_VALUE)) is not None]


def last_reward(rewards: Iterable[Reward], role: str | None) -> float | None:
    """The last value given to `role` as a whole, or, for None, to the rollout as a whole."""
    values = [reward.value for reward in rewards if reward.target is None and reward.role == role]
    return values[-1] if values else None


def rewards_by_target(rewards: Iterable[Reward]) -> dict[str, list[Reward]]:
    found: dict[str, list[Reward]] = {}
    for reward in rewards:
        if reward.target:
            found.setdefault(reward.target, []).append(reward)
    return found


def _to_reward(span: Span, value: float) -> Reward:
    dimensions = {
        name.removeprefix(semconv.REWARD_PREFIX): number
        for name in span.attributes
        if name.startswith(semconv.REWARD_PREFIX) and name not in _NOT_DIMENSIONS
        if (number := span.number(name)) is not None
    }
    return Reward(value, dimensions, span.text(semconv.REWARD_TARGET), span.role)
