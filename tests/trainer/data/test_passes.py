"""Passes contain every row once, fit the limit, and compute a shared prefix once."""

from collections.abc import Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from agl_trainer.data import passes as module
from agl_trainer.data.passes import PASS, PassNode, SharedPrefix, plan_padded_passes, plan_passes, shape_of, union_of
from agl_trainer.data.prefix_tree import pack_rows
from agl_trainer.data.rows import SampledRow, TrainingRow

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=12)


def row(token_ids: Sequence[int]) -> TrainingRow:
    return TrainingRow(token_ids, [0] * len(token_ids), 1.0)


def passes(parts: "Sequence[PassNode[TrainingRow]]", start: int = 0) -> Iterator[tuple[int, list[TrainingRow]]]:
    """Each pass with the length of the prefixes above it, which follow each other without a gap."""
    for part in parts:
        if isinstance(part, SharedPrefix):
            assert part.start == start < part.end
            yield from passes(part.children, part.end)
        else:
            yield start, part


def computed(parts: "Sequence[PassNode[TrainingRow]]") -> int:
    """Tokens of all shared prefixes."""
    prefixes = [part for part in parts if isinstance(part, SharedPrefix)]
    return sum(prefix.end - prefix.start + computed(prefix.children) for prefix in prefixes)


def distinct(rows: Sequence[TrainingRow]) -> int:
    return len(pack_rows([list(row.token_ids) for row in rows]).token_ids) if rows else 0


@given(ROWS, st.integers(1, 30))
def test_every_row_is_in_one_pass_and_passes_are_small(rows: list[list[int]], pack_tokens: int) -> None:
    found = list(passes(plan_passes(map(row, rows), pack_tokens)))
    assert sorted(list(row.token_ids) for _, part in found for row in part) == sorted(rows)
    for start, part in found:
        assert len({tuple(row.token_ids[:start]) for row in part}) == 1
        assert distinct(part) <= pack_tokens or len({tuple(row.token_ids) for row in part}) == 1


def test_no_token_is_computed_twice_if_shared_prefixes_are_long_enough() -> None:
    """Two groups under one long system prompt, each with turns of their own that share more."""
    system, rows = list(range(100, 150)), []
    for group in range(2):
        prompt = [*system, *range(200 + 100 * group, 240 + 100 * group)]
        rows += [row([*prompt, *range(400 + 10 * i, 430 + 10 * i)]) for i in range(3)]
    parts = plan_passes(rows, 150)
    (prefix,) = parts
    assert isinstance(prefix, SharedPrefix) and (prefix.start, prefix.end) == (0, 50)
    assert [(part.start, part.end) for part in prefix.children if isinstance(part, SharedPrefix)] == [
        (50, 90),
        (50, 90),
    ]
    found = list(passes(parts))
    assert [(start, len(part)) for start, part in found] == [(90, 2), (90, 1)] * 2
    assert computed(parts) + sum(distinct(part) - start for start, part in found) == distinct(rows)


def test_a_short_prefix_is_computed_in_each_pass() -> None:
    rows = [row([1] * (module._MIN_PREFIX_TOKENS - 1) + [token] * 20) for token in (2, 3, 4)]
    assert plan_passes(rows, 60) == [[rows[0]], [rows[1]], [rows[2]]]


def test_a_pass_is_filled_with_rows_that_share_a_prefix() -> None:
    rows = [[1, 1, 1, 5], [2, 2, 2, 5], [1, 1, 1, 6], [2, 2, 2, 6], [1, 1, 1, 7]]
    found = [[row.token_ids for row in part] for _, part in passes(plan_passes(map(row, rows), 6))]
    assert found == [[[1, 1, 1, 5], [1, 1, 1, 6], [1, 1, 1, 7]], [[2, 2, 2, 5], [2, 2, 2, 6]]]


def test_the_same_row_many_times_is_one_pass() -> None:
    rows = [row([7] * 50)] * 3
    assert [part for _, part in passes(plan_passes(rows, 10))] == [rows]


@given(ROWS, st.integers(1, 30))
def test_padded_passes_hold_few_tokens_padding_included(rows: list[list[int]], pack_tokens: int) -> None:
    found = plan_padded_passes(map(row, rows), pack_tokens)
    assert sorted(list(row.token_ids) for part in found for row in part) == sorted(rows)
    for part in found:
        assert len(part) * max(len(row.token_ids) for row in part) <= pack_tokens or len(part) == 1


def test_values_of_the_trained_tokens() -> None:
    sampled = SampledRow([1, 2, 3], [0, 1, 1], 1.0, [0.0, -1.0, -2.0], [0.0, 3.0, 4.0])
    assert sampled.trained(sampled.logprobs) == [-1.0, -2.0]


def test_the_union_of_shapes_covers_each_of_them() -> None:
    below_a_prefix = shape_of([SharedPrefix(row([1, 2, 3]), 0, 2, [[row([1, 2, 3])], [row([1, 2, 4])]]), [row([5])]])
    assert below_a_prefix == ((PASS, PASS), PASS)
    assert union_of([below_a_prefix, (PASS,)]) == ((PASS, PASS), PASS)
    assert union_of([(PASS, PASS, PASS), below_a_prefix]) == ((PASS, PASS), PASS, PASS)
    assert union_of([((PASS, (PASS, PASS)),), below_a_prefix]) == ((PASS, (PASS, PASS)), PASS)
    assert union_of([(), ()]) == ()
