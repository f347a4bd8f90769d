"""Tasks and examples that a function of the configuration returns: a list of JSON values, read once."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from agl.errors import ConfigError
from agl.runner.import_function import load_function


def load_list(reference: str | None, key: str) -> list[Any]:
    """The items that the function `reference` returns, as JSON values.

    The function may return a list, tuple, iterator, generator or data set, also a table of pandas, Polars or PyArrow,
    whose rows are the items. It is called once in a process. Raises ConfigError, with `key`, for anything else.
    """
    return _items(load_function(reference, key), f"{key}: {reference}")


def task_ids(tasks: Sequence[Any]) -> list[str]:
    """A name for each task: its `id`, else its place in the list; a name that is taken gets a number."""
    names: dict[str, None] = {}
    for place, task in enumerate(tasks):
        given = task.get("id") if isinstance(task, dict) else None
        name = first = str(place if given is None else given)
        number = 2
        while name in names:
            name, number = f"{first}#{number}", number + 1
        names[name] = None
    return list(names)


@cache
def _items(function: Callable[[], Any], where: str) -> list[Any]:
    try:
        rows = _rows(function(), where)
    except ConfigError:
        raise
    except Exception as error:  # the function is the user's: any error of it must name it
        raise ConfigError(f"{where} raised {type(error).__name__}: {error}") from error
    if not rows:
        raise ConfigError(f"{where} returned no items, expected at least one")
    return [_json_value(row, f"{where}: item {number}") for number, row in enumerate(rows)]


def _rows(items: Any, where: str) -> list[Any]:
    if isinstance(items, Mapping):
        advice = f"; return one of its splits ({', '.join(map(str, items))})" if type(items) is not dict else ""
        raise ConfigError(f"{where} returned a {type(items).__name__}, expected a list of tasks{advice}")
    if hasattr(items, "iterrows"):  # pandas: an iterator over a DataFrame has its column names
        return items.to_dict("records")
    for to_rows in ("to_pylist", "to_dicts"):  # PyArrow, Polars
        if hasattr(items, to_rows):
            return getattr(items, to_rows)()
    if isinstance(items, str | bytes) or not (hasattr(items, "__iter__") or hasattr(items, "__getitem__")):
        raise ConfigError(f"{where} returned {type(items).__name__}, expected a list of tasks")
    return list(items)


def _json_value(value: Any, where: str) -> Any:
    """`value` with lists for tuples, arrays and scalars of NumPy as Python has them. Raises ConfigError at `where`."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"{where}: the key {key!r} is {type(key).__name__}, expected text, as JSON has it")
        return {key: _json_value(item, f"{where}: {key!r}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item, f"{where}[{place}]") for place, item in enumerate(value)]
    if isinstance(value, bool | int | str | None) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ConfigError(
        f"{where} is {repr(value)[:80]}, a {type(value).__name__}: JSON has no form for it; return text or a number"
    )
