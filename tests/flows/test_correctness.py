"""Our plug-ins pass the checks of the correctness page in every situation."""

import pytest

from benchmarks.correctness import PAGE, Column, examine, page, situations
from benchmarks.instrumentations import COMPARED, Instrumentation

OURS = [(framework, column) for framework, columns in COMPARED.items() for column in columns if column.is_ours]


@pytest.mark.parametrize(("framework", "ours"), OURS, ids=[framework for framework, _ in OURS])
def test_our_spans_are_right_in_every_situation(framework: str, ours: Instrumentation) -> None:
    verdicts = examine(framework, ours).verdicts
    assert {title: wrong for title, wrong in verdicts.items() if wrong} == {}
    assert list(verdicts) == [situation.title for situation in situations(framework)]


@pytest.mark.parametrize("framework", COMPARED)
def test_the_page_has_the_situations_of_today(framework: str) -> None:
    text = PAGE.read_text(encoding="utf-8")
    for situation in situations(framework):
        assert f"| {situation.title} | yes |" in text


def test_a_situation_that_goes_wrong_is_shown_with_its_reason() -> None:
    columns = [Column("ours", [], {"a run ends": None}), Column("theirs", [], {"a run ends": "it *never* does"})]
    text = page({"langchain": columns})
    assert "| a run ends | yes | **no** |" in text
    assert "### theirs\n\n- a run ends: it \\*never\\* does" in text and "### ours" not in text
