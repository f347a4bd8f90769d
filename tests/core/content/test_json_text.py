"""`content_json`."""

import json
from datetime import datetime

import pytest

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
