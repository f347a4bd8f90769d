"""`content_json`."""

import json
import threading
import time
from collections import UserDict
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict

from agl.content.filter import content_json


def test_json_is_compact_and_not_escaped():
    assert content_json([{"role": "user", "content": "für 七"}]) == '[{"role":"user","content":"für 七"}]'


@pytest.mark.parametrize(
    ("value", "read_back"),
    [
        ("half a pair \ud83d", "half a pair \ud83d"),
        ({"many": 2**70}, {"many": 2**70}),
        ({7: "a key that is a number"}, {"7": "a key that is a number"}),
        ([float("nan")], [None]),
        ([datetime(2026, 1, 2)], ["2026-01-02 00:00:00"]),
        (
            {
                "a": {
                    1,
                }
            },
            {"a": "{1}"},
        ),
    ],
)
def test_values_that_json_has_no_form_for_are_written(value, read_back):
    assert json.loads(content_json(value)) == read_back


def test_default_converts_values_that_json_has_no_form_for():
    assert content_json([1j], default=lambda value: {"imaginary": value.imag}) == '[{"imaginary":1.0}]'


class Locked(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    lock: Any


class NoText:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


class Unreadable(UserDict[str, int]):
    def items(self) -> Any:
        raise RuntimeError("no items")


CIRCULAR: dict[str, Any] = {"kept": 1}
CIRCULAR["self"] = CIRCULAR
DEEP: dict[str, Any] = {}
_INNER = DEEP
for _ in range(3000):
    _INNER["kept"] = _INNER = {}  # type: ignore[assignment]


@pytest.mark.parametrize("convert", [str, repr, lambda value: value.model_dump(mode="json"), lambda value: value])
@pytest.mark.parametrize(
    ("value", "part"),
    [
        ({(1, 2): "kept"}, '"(1, 2)":"kept"'),
        ({np.int64(3): "kept"}, '"3":"kept"'),
        (["kept", Locked(lock=threading.Lock())], "kept"),
        (["kept", NoText()], "kept"),
        ([{NoText(): "kept"}], "kept"),
        (["kept", Unreadable(a=1)], "kept"),
        (CIRCULAR, '"kept":1,"self":"<circular dict>"'),
        (DEEP, '{"kept":{"kept":'),
        (["kept", 10**5000], "<int of 16610 bits>"),
        ({"kept": float("inf"), "\ud83d": 1}, '"kept":null'),
    ],
)
def test_any_value_is_written_in_part(value: Any, part: str, convert: Any) -> None:
    text = content_json(value, convert)

    assert part in text
    json.loads(text)


def test_a_large_value_is_written_within_a_limit_of_time() -> None:
    started = time.monotonic()
    text = content_json([{(1,): [0] * 1000} for _ in range(5000)])

    assert time.monotonic() - started < 10
    assert len(text) < 2_000_000 and "left out" in text


def test_a_value_that_is_not_json_takes_one_line_at_the_debug_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "agl")
    content_json({(1, 2): {(3, 4): NoText()}})

    (record,) = caplog.records
    assert (record.levelname, record.exc_info) == ("DEBUG", None)
