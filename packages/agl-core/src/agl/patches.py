"""Patches of a framework: attributes that a plug-in replaces, and their originals."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

_ABSENT: Any = object()


class Patches:
    """Replaced attributes of classes and modules. `restore` puts back the same objects that were there before."""

    def __init__(self) -> None:
        self._undo = ExitStack()

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Restore everything if the block raises, so that a framework is never left half patched."""
        try:
            yield
        except BaseException:
            self.restore()
            raise

    def replace(self, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        """Set `owner.name` to `wrap(current value)`; `owner` is a class or a module."""
        original = vars(owner).get(name, _ABSENT)
        setattr(owner, name, wrap(getattr(owner, name)))
        self.on_restore(_put_back, owner, name, original)

    def on_restore(self, undo: Callable[..., Any], *args: Any) -> None:
        """Have `restore` call `undo(*args)`: for a change other than a replaced attribute."""
        self._undo.callback(undo, *args)

    def restore(self) -> None:
        """Undo all changes, the latest first."""
        self._undo.close()


def _put_back(owner: Any, name: str, original: Any) -> None:
    if original is _ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, original)
