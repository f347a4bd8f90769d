"""Rows in passes: none is lost, none is too large, neighbours share."""

from hypothesis import given
from hypothesis import strategies as st

from agl_trainer.batch import SampledRow, TrainingRow, passes
from agl_trainer.tree import pack_rows

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=12)


def row(token_ids: list[int]) -> TrainingRow:
    return TrainingRow(token_ids, [0] * len(token_ids), 1.0)


@given(ROWS, st.integers(1, 30))
def test_every_row_is_in_one_pass_and_passes_are_small(rows: list[list[int]], pack_tokens: int) -> None:
    found = list(passes(map(row, rows), pack_tokens))
    assert sorted(list(row.token_ids) for part in found for row in part) == sorted(rows)
    for part in found:
        distinct = len(pack_rows([row.token_ids for row in part]).token_ids)
        assert distinct <= pack_tokens or len(part) == 1


def test_a_pass_is_filled_with_rows_that_share() -> None:
    rows = [[1, 1, 1, 5], [2, 2, 2, 5], [1, 1, 1, 6], [2, 2, 2, 6], [1, 1, 1, 7]]
    found = [[row.token_ids for row in part] for part in passes(map(row, rows), 6)]
    assert found == [[[1, 1, 1, 5], [1, 1, 1, 6], [1, 1, 1, 7]], [[2, 2, 2, 5], [2, 2, 2, 6]]]


def test_the_values_of_trained_tokens() -> None:
    sampled = SampledRow([1, 2, 3], [0, 1, 1], 1.0, [0.0, -1.0, -2.0], [0.0, 3.0, 4.0])
    assert sampled.trained(sampled.logprobs) == [-1.0, -2.0]
