"""Replaced attributes of the framework, and the way back."""

from collections.abc import Callable
from typing import Any

Undo = Callable[[], None]


def replace(owner: type, name: str, wrap: Callable[[Any], Any]) -> Undo:
    """Set `owner.name` to `wrap(current value)`. Returns what puts back the very object that was there."""
    original = owner.__dict__[name]
    setattr(owner, name, wrap(original))
    return lambda: setattr(owner, name, original)
