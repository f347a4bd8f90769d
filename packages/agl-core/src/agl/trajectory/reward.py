"""Rewards, read from the spans that carry them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from agl import semconv
from agl.span import Span
from agl.trajectory.attributes import read_number

_NOT_DIMENSIONS = {semconv.REWARD_VALUE, semconv.REWARD_TARGET}
_NUMBERED = re.compile(r"agentlightning\.reward\.\d+\.name")
"""agentlightning's dimensions: `agentlightning.reward.<i>.name` and `.value`; number 0 is the scalar."""
_LINK = re.compile(r"agentlightning\.link\.\d+\.key_match")
"""agentlightning's targets: the spans whose attribute `.key_match` has the value `.value_match`."""


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward as emitted: for one call (`target`), for a role or, with neither, for the rollout."""

    value: float
    dimensions: dict[str, float]
    target: str | None
    """Response id or span id. agentlightning can link by other attributes; such a target matches no call."""
    role: str | None


def read_reward(span: Span) -> Reward | None:
    """The reward that `span` carries, if any."""
    value = read_number(span, semconv.REWARD_VALUE)
    if value is None:
        return None
    dimensions = {
        name.removeprefix(semconv.REWARD_PREFIX): number
        for name in span.attributes
        if name.startswith(semconv.REWARD_PREFIX) and name not in _NOT_DIMENSIONS
        if (number := span.number(name)) is not None
    }
    target = span.text(semconv.REWARD_TARGET) or _linked_target(span)
    return Reward(value, dimensions | _numbered_dimensions(span), target, span.role)


def last_reward(rewards: Iterable[Reward], role: str | None) -> float | None:
    """The last value given to `role` as a whole or, for None, to the rollout as a whole."""
    values = [reward.value for reward in rewards if reward.target is None and reward.role == role]
    return values[-1] if values else None


def by_target(rewards: Iterable[Reward]) -> dict[str, list[Reward]]:
    found: dict[str, list[Reward]] = {}
    for reward in rewards:
        if reward.target:
            found.setdefault(reward.target, []).append(reward)
    return found


def _numbered_dimensions(span: Span) -> dict[str, float]:
    """agentlightning's dimensions by name, without the scalar, which it names `primary`."""
    prefixes = [name.removesuffix(".name") for name in span.attributes if _NUMBERED.fullmatch(name)]
    named = {span.text(f"{prefix}.name"): span.number(f"{prefix}.value") for prefix in prefixes}
    return {name: value for name, value in named.items() if name not in (None, "primary") and value is not None}


def _linked_target(span: Span) -> str | None:
    """The target that agentlightning's links name."""
    prefixes = [name.removesuffix(".key_match") for name in span.attributes if _LINK.fullmatch(name)]
    links = {span.text(f"{prefix}.key_match"): span.text(f"{prefix}.value_match") for prefix in prefixes}
    named = links.get(semconv.GEN_AI_RESPONSE_ID) or links.get("span_id")
    return named or ", ".join(f"{key} {value}" for key, value in links.items()) or None
