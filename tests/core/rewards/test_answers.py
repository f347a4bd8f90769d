"""Exact, pattern, number and JSON schema: what counts, and what makes the reward missing."""

from pathlib import Path
from typing import Any

import pytest

from agl.errors import RewardError
from agl.rewards.answers import Exact, JsonSchema, Matches, Number

SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("scorer", "task", "answer", "expected"),
    [
        (Exact(), {"answer": "Oslo"}, " Oslo\n", 1.0),
        (Exact(), {"answer": "Oslo"}, "oslo", 0.0),
        (Exact(ignore_case=True), {"answer": "Oslo"}, "OSLO", 1.0),
        (Exact("n", answer="n"), {"n": [1, 2]}, {"n": [1, 2]}, 1.0),
        (Exact(lambda task: task["a"] + 1), {"a": 1}, 2, 1.0),
        (Matches(r"\d{4}"), {}, "in 2024", 1.0),
        (Matches(r"\d{4}"), {}, "in 24", 0.0),
        (Matches(r"\w"), {}, None, 0.0),
        (Matches(), {"pattern": "^yes"}, "yes, please", 1.0),
        (Number(), {"answer": 1234.5}, "It is 1,234.5.", 1.0),
        (Number(), {"answer": "1234.5"}, "first 7, then 1234.49", 0.0),
        (Number(relative=0.01), {"answer": 100}, "about 99.5", 1.0),
        (Number(), {"answer": -2000}, "-2e3", 1.0),
        (Number(), {"answer": 5}, "no idea", 0.0),
        (Number(), {"answer": 10}, "pages 5-10", 1.0),
        (Number(), {"answer": -5}, "x = \u22125", 1.0),
        (Number(answer="n"), {"answer": 0.5}, {"n": 0.5}, 1.0),
        (JsonSchema(SCHEMA), {}, '{"n": 1}', 1.0),
        (JsonSchema(SCHEMA), {}, {"n": "1"}, 0.0),
        (JsonSchema(SCHEMA), {}, "{n: 1", 0.0),
        (JsonSchema(), {"schema": {"type": "array"}}, "[]", 1.0),
    ],
)
def test_what_counts(scorer: Any, task: Any, answer: Any, expected: float) -> None:
    assert scorer(task, answer) == expected


@pytest.mark.parametrize(
    ("scorer", "task", "message"),
    [
        (Exact(), {"gold": "Oslo"}, "the task has no 'answer', it is keys gold"),
        (Matches(), {"pattern": "("}, "is no regular expression"),
        (Number(), {"answer": "many"}, "the task has 'many', expected a number"),
        (JsonSchema(), {"schema": {"type": "text"}}, "the JSON schema is invalid"),
    ],
)
def test_a_task_that_cannot_be_graded_is_an_error(scorer: Any, task: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        scorer(task, "answer")


def test_a_schema_reads_no_other_document(tmp_path: Path) -> None:
    document = tmp_path / "number.json"
    document.write_text('{"type": "number"}', encoding="utf-8")
    with pytest.raises(Exception, match="Unresolvable: file:"):
        JsonSchema({"$ref": document.as_uri()})({}, "1")
    assert JsonSchema({"$ref": "https://json-schema.org/draft/2020-12/schema"})({}, {"type": "number"}) == 1.0


def test_a_search_that_does_not_end_is_an_error() -> None:
    with pytest.raises(TimeoutError):
        Matches(r"(a|aa)+$")({}, "a" * 200 + "b")
