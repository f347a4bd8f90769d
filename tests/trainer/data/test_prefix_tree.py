"""Packing rows into a trie: every row can be read back, every distinct prefix is there once, ranges are subtrees."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agl_trainer.data.prefix_tree import PackedRows, Segment, pack_rows

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=10)
"""Few token ids, so that rows share prefixes of every length, repeat each other and end inside each other."""


def prefix_of_place(packed: PackedRows, rows: list[list[int]]) -> dict[int, tuple[int, ...]]:
    """The prefix of each packed index; it must be the same for all rows that use the index."""
    found: dict[int, tuple[int, ...]] = {}
    for row, index in zip(rows, packed.row_index, strict=True):
        for depth, place in enumerate(index.tolist()):
            assert found.setdefault(place, tuple(row[: depth + 1])) == tuple(row[: depth + 1])
    return found


@given(ROWS)
def test_rows_are_read_back(rows: list[list[int]]) -> None:
    packed = pack_rows(rows)
    for row, index in zip(rows, packed.row_index, strict=True):
        assert packed.token_ids[index].tolist() == row
        assert packed.positions[index].tolist() == list(range(len(row)))


@given(ROWS)
def test_every_distinct_prefix_is_packed_once(rows: list[list[int]]) -> None:
    packed = pack_rows(rows)
    prefixes = {tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)}
    assert len(packed.token_ids) == len(packed.positions) == len(prefixes)
    assert set(prefix_of_place(packed, rows)) == set(range(len(prefixes)))


@given(ROWS)
def test_segments_partition_the_places_and_their_ranges_are_their_subtrees(rows: list[list[int]]) -> None:
    packed = pack_rows(rows)
    prefix = prefix_of_place(packed, rows)
    assert [place for s in packed.segments for place in range(s.start, s.end)] == list(range(len(prefix)))
    for segment in packed.segments:
        last = prefix[segment.end - 1]
        below = {place for place, tokens in prefix.items() if len(tokens) > len(last) and tokens[: len(last)] == last}
        assert below == set(range(segment.end, segment.subtree_end))
        for place in range(segment.start + 1, segment.end):
            assert prefix[place][:-1] == prefix[place - 1]


def test_a_worked_example() -> None:
    packed = pack_rows([[5, 6, 7, 8], [5, 6, 9], [5, 6, 7], [4]])
    assert packed.token_ids.tolist() == [5, 6, 7, 8, 9, 4]
    assert packed.positions.tolist() == [0, 1, 2, 3, 2, 0]
    assert packed.segments == (
        Segment(0, 2, 5),
        Segment(2, 3, 4),
        Segment(3, 4, 4),
        Segment(4, 5, 5),
        Segment(5, 6, 6),
    )
    assert [index.tolist() for index in packed.row_index] == [[0, 1, 2, 3], [0, 1, 4], [0, 1, 2], [5]]


def test_a_conversation_of_many_turns_is_no_matter_of_recursion() -> None:
    rows = [list(range(length)) for length in range(1, 1100)]
    packed = pack_rows(rows)
    assert len(packed.token_ids) == 1099
    assert packed.segments[0] == Segment(0, 1, 1099)


def test_an_empty_row_is_refused_by_its_number() -> None:
    with pytest.raises(ValueError, match="row 1 has no tokens"):
        pack_rows([[1], []])
