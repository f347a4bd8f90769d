"""Checks that values fit into span attributes: the SDK would convert other values to text, or drop them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from agl import semconv
from agl.content.filter import content_json
from agl.context import non_empty
from agl.errors import TelemetryError
from agl.failsafe import is_strict
from agl.span import AttributeValue

_SCALARS = (bool, int, float, str, bytes)
_EXPECTED = "expected str, bytes, bool, int, float, a list of one type of them (not bytes), or a mapping"


def flat_attributes(values: Mapping[str, Any], prefix: str = "") -> dict[str, AttributeValue]:
    """`values` with keys of nested mappings joined by dots. Raises TelemetryError, naming the key, for a bad value."""
    if not isinstance(values, Mapping):
        raise TelemetryError(f"attributes are {type(values).__name__}, expected a mapping")
    flat: dict[str, AttributeValue] = {}
    for name, value in values.items():
        if not isinstance(name, str) or not name:
            raise TelemetryError(f"attribute name {prefix}{name!r} is not a non-empty string")
        key = prefix + name
        if isinstance(value, Mapping):
            flat |= flat_attributes(value, prefix=f"{key}.")
        else:
            flat[key] = _array(key, value) if isinstance(value, list | tuple) else _scalar(key, value)
    return flat


def role_attribute(role: str | None) -> dict[str, str]:
    """`agl.role`; empty for None, so the span gets the current role. Raises TelemetryError for an empty name."""
    return {} if role is None else {semconv.ROLE: non_empty("role", role)}


def json_text(name: str, value: Any) -> str:
    """`value` as JSON, with the `repr` of what JSON has no form for. If `AGL_STRICT=1`, that raises TelemetryError."""
    if is_strict():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise TelemetryError(f"{name} ({type(value).__name__}) cannot be written as JSON: {error}") from error
    return content_json(value, repr)


def _scalar(key: str, value: Any) -> str | bool | int | float | bytes:
    if isinstance(value, str) and not _is_unicode(value):
        raise TelemetryError(f"attribute {key} holds half of a surrogate pair, which UTF-8 cannot carry")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise TelemetryError(f"attribute {key} is {value}, which does not fit into 64 bits")
    if not isinstance(value, _SCALARS):
        raise TelemetryError(
            f"attribute {key} is {type(value).__name__}, {_EXPECTED}; emit_object keeps any JSON value"
        )
    return value


def _array(key: str, values: Sequence[Any]) -> list[str] | list[bool] | list[int] | list[float]:
    """`values` as an array of one type; a mix of ints and floats becomes floats."""
    items: list[Any] = [_scalar(f"{key}[{index}]", value) for index, value in enumerate(values)]
    kinds = {next(kind for kind in _SCALARS if isinstance(item, kind)) for item in items}
    if kinds == {int, float}:
        return [float(item) for item in items]
    if len(kinds) > 1 or bytes in kinds:
        raise TelemetryError(f"attribute {key} mixes {', '.join(sorted(kind.__name__ for kind in kinds))}, {_EXPECTED}")
    return items


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
