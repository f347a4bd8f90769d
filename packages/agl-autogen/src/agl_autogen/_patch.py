"""Replaced attributes of the framework, and the way back."""

from collections.abc import Callable
from typing import Any

_ABSENT: Any = object()


class Patches:
    """Every attribute replaced so far; `restore` puts back the very objects that were there."""

    def __init__(self) -> None:
        self._originals: list[tuple[Any, str, Any]] = []

    def replace(self, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        """Set `owner.name` to `wrap(current value)`; `owner` is a class or a module."""
        self._originals.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, wrap(getattr(owner, name)))

    def restore(self) -> None:
        """Undo every replacement, the latest first."""
        while self._originals:
            owner, name, original = self._originals.pop()
            if original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
