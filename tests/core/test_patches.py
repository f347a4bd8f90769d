"""`Patches`: replaced attributes come back, also after a patch that fails."""

from collections.abc import Callable
from typing import Any

import pytest

from agl.patches import Patches


class Base:
    def greet(self) -> str:
        return "hello"


class Derived(Base):
    pass


def shouting(original: Callable[..., str]) -> Callable[..., str]:
    return lambda self: original(self).upper()


def test_restore_puts_back_the_same_objects_the_latest_first() -> None:
    before = vars(Base)["greet"]
    restored: list[str] = []
    patches = Patches()
    patches.on_restore(restored.append, "first")
    patches.replace(Base, "greet", shouting)
    patches.replace(Base, "greet", lambda original: lambda self: original(self) + "!")
    patches.on_restore(restored.append, "last")

    assert Base().greet() == "HELLO!"
    patches.restore()

    assert vars(Base)["greet"] is before and restored == ["last", "first"]
    patches.restore()
    assert restored == ["last", "first"]


def test_an_inherited_attribute_is_removed_again() -> None:
    patches = Patches()
    patches.replace(Derived, "greet", shouting)

    assert (Derived().greet(), Base().greet()) == ("HELLO", "hello")
    patches.restore()

    assert "greet" not in vars(Derived)


def failing(original: Any) -> Any:
    raise LookupError("no such patch")


@pytest.mark.parametrize(("name", "wrap"), [("greet", failing), ("missing", shouting)])
def test_a_patch_that_fails_undoes_the_earlier_ones(name: str, wrap: Callable[[Any], Any]) -> None:
    before = vars(Base)["greet"]
    patches = Patches()

    with pytest.raises((LookupError, AttributeError)), patches.all_or_none():
        patches.replace(Base, "greet", shouting)
        patches.replace(Base, name, wrap)

    assert vars(Base)["greet"] is before and not hasattr(Base, "missing")
