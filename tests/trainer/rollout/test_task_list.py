"""Tasks as users return them: data sets, tuples, iterators and tables; what JSON has no form for is named."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agl.errors import ConfigError
from agl_trainer.rollout.task_list import load_list, task_ids

ROWS = [{"id": "a", "n": 1}, {"id": "b", "n": 2}]
SOURCES = """
import numpy as np
class DataSet:  # map-style, as of torch
    def __len__(self): return 2
    def __getitem__(self, place): return ROWS[place]
class Frame:  # as pandas has it: an iterator over it has the names of the columns
    def __iter__(self): return iter(["id", "n"])
    def iterrows(self): raise AssertionError
    def to_dict(self, orient): return ROWS if orient == "records" else {}
class Table:
    def to_pylist(self): return ROWS
class Splits(dict): pass
ROWS = [{"id": "a", "n": 1}, {"id": "b", "n": 2}]
ONCE = iter(ROWS)
as_list = lambda: ROWS
as_tuple = lambda: tuple(ROWS)
as_generator = lambda: (row for row in ROWS)
as_iterator = lambda: ONCE
as_data_set = DataSet
as_frame = Frame
as_table = Table
as_numpy = lambda: [{"id": np.str_("a"), "n": np.int64(1)}, {"id": "b", "n": np.array(2)}]
splits = lambda: Splits(train=ROWS, test=ROWS)
a_dict = lambda: {"a": 1}
text = lambda: "rows"
number = lambda: 3
nothing = lambda: []
keys = lambda: [{"id": 1}, {2: "x"}]
nan = lambda: [{"id": 1}, {"x": {"y": [0.0, float("nan")]}}]
deep = lambda: [{"x": ({1},)}]
raises = lambda: 1 / 0
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "task_sources.py").write_text(SOURCES)
    yield
    sys.modules.pop("task_sources", None)


@pytest.mark.parametrize("name", ["list", "tuple", "generator", "iterator", "data_set", "frame", "table", "numpy"])
def test_rows_of_every_kind_of_collection_are_tasks(name: str) -> None:
    reference = f"task_sources:as_{name}"
    assert load_list(reference, "train.tasks") == ROWS
    assert load_list(reference, "train.tasks") == ROWS  # an iterator is read once


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("splits", r"returned a Splits.*return one of its splits \(train, test\)"),
        ("a_dict", "returned a dict, expected a list"),
        ("text", "returned str"),
        ("number", "returned int"),
        ("nothing", "returned no items"),
        ("keys", "item 1: the key 2 is int, expected text"),
        ("nan", r"item 1: 'x': 'y'\[1\] is nan, a float"),
        ("deep", r"item 0: 'x'\[0\] is \{1\}, a set"),
        ("raises", "raised ZeroDivisionError"),
    ],
)
def test_what_is_no_list_of_json_values_is_named_with_its_key(name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"train.tasks: task_sources:{name}.*{problem}"):
        load_list(f"task_sources:{name}", "train.tasks")


def test_each_task_has_a_name_of_its_own() -> None:
    tasks: list[Any] = [{"id": "a"}, {"id": "a"}, {"id": "a#2"}, {"id": None}, "text", {"id": 4}, {"id": "4"}]
    assert task_ids(tasks) == ["a", "a#2", "a#2#2", "3", "4", "4#2", "4#3"]
