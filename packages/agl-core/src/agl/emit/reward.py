"""How good it was: a number, or several dimensions and their weighted sum."""

import math
from collections.abc import Mapping
from typing import Any, SupportsFloat

from opentelemetry import trace

from agl import semconv
from agl.emit.attributes import role_attribute
from agl.emit.record import record
from agl.errors import TelemetryError

Reward = float | Mapping[str, float]
"""A number, or a number for each dimension. bool and int count as numbers, and so does anything with `__float__`."""

_RESERVED = {semconv.REWARD_VALUE, semconv.REWARD_TARGET}
_weights: dict[str, float] = {}


def emit_reward(
    value: Reward,
    *,
    target: str | trace.Span | None = None,
    role: str | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> str | None:
    """Record a reward: on the rollout, on one call (`target`: response id, span id or span), or on one role.

    Dimensions are weighted as given to `agl.init(reward_weights=...)`; where none were given they count alike.
    """
    return record(
        semconv.SPAN_REWARD, lambda: reward_attributes(value, target=target, role=role, weights=_weights), attributes
    )


def use_weights(weights: Mapping[str, float]) -> None:
    """Weigh the dimensions of every later `emit_reward` of this process. Raises TelemetryError for a bad number."""
    checked = {name: _number(f"weight of {name!r}", weight) for name, weight in weights.items()}
    _weights.clear()
    _weights.update(checked)


def weights_in_use() -> dict[str, float]:
    """What `use_weights` was last given."""
    return dict(_weights)


def reward_attributes(
    value: Reward,
    *,
    target: str | trace.Span | None = None,
    role: str | None = None,
    weights: Mapping[str, float] | None = None,
) -> dict[str, str | float]:
    """Attributes of the span: the scalar, one float for each dimension, target and role. Raises TelemetryError."""
    parts = _dimensions(value) if isinstance(value, Mapping) else {}
    scalar = weighted_sum(parts, weights or {}) if parts else _number("reward", value)
    found: dict[str, str | float] = {semconv.REWARD_VALUE: scalar}
    found |= {semconv.REWARD_PREFIX + name: part for name, part in parts.items()}
    if target is not None:
        found[semconv.REWARD_TARGET] = _target_id(target)
    return found | role_attribute(role)


def weighted_sum(parts: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Sum of weight times part. With no weights at all, the mean: the scalar stays in the range of its parts.

    A weighted dimension that is left out adds nothing. Raises TelemetryError for a dimension without a weight.
    """
    if not weights:
        return math.fsum(parts.values()) / len(parts)
    unknown = sorted(parts.keys() - weights.keys())
    if unknown:
        raise TelemetryError(
            f"reward dimension {', '.join(unknown)} has no weight; weighted are {', '.join(sorted(weights))}"
            " (config `rewards`, agl.init(reward_weights=...))"
        )
    return math.fsum(weights[name] * part for name, part in parts.items())


def _dimensions(value: Mapping[Any, Any]) -> dict[str, float]:
    if not value:
        raise TelemetryError("reward is an empty mapping, expected at least one dimension")
    for name in value:
        if not isinstance(name, str) or not name or semconv.REWARD_PREFIX + name in _RESERVED:
            raise TelemetryError(
                f"reward dimension {name!r} cannot be used; expected a name other than value or target"
            )
    return {name: _number(f"reward dimension {name!r}", part) for name, part in value.items()}


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
