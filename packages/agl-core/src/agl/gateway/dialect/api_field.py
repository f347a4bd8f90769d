"""How a translated API's fields become fields of a chat completion: each is translated, ignored on purpose or refused.

The tables of docs/04 are those of `Messages.fields` and `Responses.fields`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from agl.tokens.capture import Json


class Treatment(StrEnum):
    PASSED_ON = "passed on"
    TRANSLATED = "translated"
    IGNORED = "ignored"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Field:
    """A field, or a type of item in a list. `note` is what it becomes, or why it does not."""

    treatment: Treatment
    note: str = ""


Fields = Mapping[str, Field]
"""By path: `output_config.format`, or of a type `input[]: reasoning`."""
PASSED_ON: Final = Field(Treatment.PASSED_ON)


def translated(note: str) -> Field:
    return Field(Treatment.TRANSLATED, note)


def ignored(reason: str) -> Field:
    return Field(Treatment.IGNORED, reason)


def refused(reason: str) -> Field:
    return Field(Treatment.REFUSED, reason)


def passed_on(body: Json, fields: Fields) -> Json:
    """The fields of a request that the engine gets as they are: also those that the API does not have.

    Raises ValueError for a field that is set and refused.
    """
    for name, value in body.items():
        _check(name, value, fields.get(name, PASSED_ON))
    return {name: value for name, value in body.items() if fields.get(name, PASSED_ON) is PASSED_ON}


def check_object(value: Json, path: str, fields: Fields) -> Json:
    """`value`, the object at `path`. Raises ValueError for a field that is set and refused, or that the API lacks."""
    for name, part in value.items():
        if name not in _BOOKKEEPING:
            _check(f"{path}.{name}", part, fields.get(f"{path}.{name}", _UNKNOWN))
    return value


def check_type(item: Json, path: str, fields: Fields, default: str = "") -> str:
    """The type of an item in the list at `path`. Raises ValueError for one that is refused, or that the API lacks."""
    kind = item.get("type") or default
    _check(f"{path} of type {kind!r}", True, fields.get(f"{path}: {kind}", _UNKNOWN))
    return kind


_UNKNOWN: Final = refused("engines have nothing like it")
_BOOKKEEPING: Final = ("type", "id", "status")
"""Fields that say nothing to a model. `check_type` checks the type."""


def _check(name: str, value: Any, field: Field) -> None:
    if field.treatment is Treatment.REFUSED and value:
        raise ValueError(f"{name} is refused: {field.note}")
