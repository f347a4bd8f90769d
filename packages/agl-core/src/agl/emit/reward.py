"""`emit_reward`: a number, or several dimensions and their weighted sum."""

import math
from collections.abc import Mapping
from typing import Any, SupportsFloat

from opentelemetry import trace

from agl import semconv
from agl.emit.attributes import role_attribute
from agl.emit.record import record
from agl.errors import TelemetryError

Reward = float | Mapping[str, float | None]
"""A number, or a number for each dimension; anything with `__float__` is a number, bool included.

A dimension that is None abstains: it is left out.
"""

_RESERVED = {semconv.REWARD_VALUE, semconv.REWARD_TARGET}
_weights: dict[str, float] = {}


def emit_reward(
    value: Reward,
    *,
    target: str | trace.Span | None = None,
    role: str | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> str | None:
    """Record a reward of the rollout, of one call (`target`: response id, span id or span), or of one role.

        agl.emit_reward(1.0)
        agl.emit_reward({"syntax": 1, "goal": 0.5}, role="executor")

    Dimensions are summed with the weights of `agl.init(reward_weights=...)`; without weights, their mean is taken.
    """
    return record(
        semconv.SPAN_REWARD, lambda: reward_attributes(value, target=target, role=role, weights=_weights), attributes
    )


def record_missing_reward(reason: str) -> str | None:
    """Record that the rollout has no reward, because of `reason`."""
    return record(semconv.SPAN_REWARD, lambda: {semconv.REWARD_MISSING: reason}, None)


def use_weights(weights: Mapping[str, float]) -> None:
    """Set the weights of reward dimensions in this process. Raises TelemetryError for a weight that is not finite."""
    checked = {name: _number(f"weight of {name!r}", weight) for name, weight in weights.items()}
    _weights.clear()
    _weights.update(checked)


def process_weights() -> dict[str, float]:
    """The weights last given to `use_weights`."""
    return dict(_weights)


def reward_attributes(
    value: Reward,
    *,
    target: str | trace.Span | None = None,
    role: str | None = None,
    weights: Mapping[str, float] | None = None,
) -> dict[str, str | float]:
    """Attributes of the span: the scalar, one float per dimension, target and role. Raises TelemetryError."""
    parts = _dimensions(value) if isinstance(value, Mapping) else {}
    scalar = weighted_sum(parts, weights or {}) if parts else _number("reward", value)
    found: dict[str, str | float] = {semconv.REWARD_VALUE: scalar}
    found |= {semconv.REWARD_PREFIX + name: part for name, part in parts.items()}
    if target is not None:
        found[semconv.REWARD_TARGET] = _target_id(target)
    return found | role_attribute(role)


def weighted_sum(parts: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Sum of weight times part. Without any weights, the mean of the parts, which stays within their range.

    A weighted dimension that `parts` lacks adds 0. Raises TelemetryError for a dimension without a weight.
    """
    if not weights:
        return math.fsum(parts.values()) / len(parts)
    unknown = sorted(parts.keys() - weights.keys())
    if unknown:
        raise TelemetryError(
            f"reward dimension {', '.join(unknown)} has no weight; weights exist for {', '.join(sorted(weights))}"
            " (config `rewards`, agl.init(reward_weights=...))"
        )
    return math.fsum(weights[name] * part for name, part in parts.items())


def _dimensions(value: Mapping[Any, Any]) -> dict[str, float]:
    if not value:
        raise TelemetryError("reward is an empty mapping, expected at least one dimension")
    for name in value:
        if not isinstance(name, str) or not name or semconv.REWARD_PREFIX + name in _RESERVED:
            raise TelemetryError(f"reward dimension {name!r} cannot be used; expected a name except value or target")
    found = {name: _number(f"reward dimension {name!r}", part) for name, part in value.items() if part is not None}
    if not found:
        raise TelemetryError(f"all dimensions of the reward abstain ({', '.join(value)} are None), expected a number")
    return found


def _number(name: str, value: Any) -> float:
    if not isinstance(value, SupportsFloat):
        raise TelemetryError(f"{name} is {type(value).__name__}, expected a number")
    number = float(value)
    if not math.isfinite(number):
        raise TelemetryError(f"{name} is {number}, expected a finite number")
    return number


def _target_id(target: str | trace.Span) -> str:
    if isinstance(target, trace.Span):
        return trace.format_span_id(target.get_span_context().span_id)
    if not isinstance(target, str) or not target:
        raise TelemetryError(f"reward target is {target!r}, expected a response id, a span id or a span")
    return target
