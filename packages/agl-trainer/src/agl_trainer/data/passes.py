"""Splits rows into passes that fit into memory, so that no token is computed twice.

Rows that share a prefix but do not fit into one pass get a `SharedPrefix`: the prefix is computed once and kept with
its graph while the passes that share it run; see `compute.prefix`. Loss and gradient are those of a single pass.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, zip_longest
from typing import Final, Generic

from agl_trainer.data.rows import Row

_MIN_PREFIX_TOKENS = 32
"""Below this length it is cheaper to compute a shared prefix in every pass than in a pass of its own."""


@dataclass(frozen=True, slots=True)
class SharedPrefix(Generic[Row]):
    """Tokens [start, end) that all rows below `children` share; an outer prefix has the tokens before `start`."""

    row: Row
    """One of the rows."""
    start: int
    end: int
    children: "Sequence[PassNode[Row]]"


PassNode = SharedPrefix[Row] | list[Row]
"""A shared prefix, or the rows of one pass."""

PassShape = tuple["PassShape", ...]
"""Shape of a list of nodes: `PASS` for a pass, the shape of the children for a shared prefix."""
PASS: Final[PassShape] = ()


def plan_passes(rows: Iterable[Row], pack_tokens: int) -> "list[PassNode[Row]]":
    """Passes of at most `pack_tokens` distinct tokens each, prefixes above them included; one row may be longer."""
    ordered = sorted(rows, key=lambda row: list(row.token_ids))
    return _plan(ordered, 0, pack_tokens) if ordered else []


def plan_padded_passes(rows: Iterable[Row], pack_tokens: int) -> list[list[Row]]:
    """Passes for rows that are padded to the longest row of their pass: rows of similar length together."""
    passes: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row.token_ids)):
        # Rows are sorted by length, so this one is the longest of its pass.
        if passes and (len(passes[-1]) + 1) * len(row.token_ids) <= pack_tokens:
            passes[-1].append(row)
        else:
            passes.append([row])
    return passes


def split_rows(rows: Sequence[Row], count: int) -> list[list[Row]]:
    """`rows` in `count` lists with similar numbers of distinct tokens; rows that share a prefix stay together."""
    ordered = sorted(rows, key=lambda row: list(row.token_ids))
    shares: list[list[Row]] = [[] for _ in range(count)]
    total, done = _distinct_tokens(ordered, 0) if ordered else 0, 0
    for index, row in enumerate(ordered):
        new = len(row.token_ids) - (shared_length(ordered[index - 1], row) if index else 0)
        # By the middle of the row: a long row goes to the share that most of it belongs to.
        shares[min(int((done + new / 2) * count / total), count - 1)].append(row)
        done += new
    return shares


def shape_of(nodes: "Sequence[PassNode[Row]]") -> PassShape:
    return tuple(shape_of(node.children) if isinstance(node, SharedPrefix) else PASS for node in nodes)


def union_of(shapes: Sequence[PassShape]) -> PassShape:
    """The smallest shape that covers all `shapes`. A pass may use the first pass below a prefix of another shape."""
    return tuple(union_of([inner for inner in nodes if inner is not None]) for nodes in zip_longest(*shapes))


def _plan(rows: list[Row], start: int, pack_tokens: int) -> "list[PassNode[Row]]":
    """Nodes of sorted `rows`, whose first `start` tokens an outer prefix has."""
    if len(rows) == 1 or start + _distinct_tokens(rows, start) <= pack_tokens:
        return [rows]
    shared = max(shared_length(rows[0], rows[-1]), start)
    if shared - start >= _MIN_PREFIX_TOKENS:
        return [SharedPrefix(rows[0], start, shared, _plan(rows, shared, pack_tokens))]
    # By their first token that differs; rows that end before it come first.
    branches = [list(branch) for _, branch in groupby(rows, key=lambda row: list(row.token_ids[shared : shared + 1]))]
    return _merge_small(branches, start, shared, pack_tokens) if len(branches) > 1 else [rows]


def _merge_small(branches: Iterable[list[Row]], start: int, shared: int, pack_tokens: int) -> "list[PassNode[Row]]":
    """Merge small neighbouring branches into one pass, and split large ones. Every pass has tokens [start, shared)."""
    nodes: list[PassNode[Row]] = []
    current: list[Row] = []
    budget = left = pack_tokens - shared
    for branch in branches:
        tokens = _distinct_tokens(branch, shared)
        if current and tokens > left:
            nodes.append(current)
            current, left = [], budget
        if tokens > left:
            nodes += _plan(branch, start, pack_tokens)
        else:
            current, left = current + branch, left - tokens
    return [*nodes, current] if current else nodes


def _distinct_tokens(rows: Sequence[Row], start: int) -> int:
    """Distinct tokens of sorted `rows` from `start` on: each row adds the tokens not shared with the row before."""
    shared = [start, *(max(shared_length(*pair), start) for pair in pairwise(rows))]
    return sum(len(row.token_ids) - known for row, known in zip(rows, shared, strict=True))


def shared_length(left: Row, right: Row) -> int:
    """Length of the longest common prefix of two rows, in tokens."""
    pairs = zip(left.token_ids, right.token_ids, strict=False)
    shorter = min(len(left.token_ids), len(right.token_ids))
    return next((index for index, (one, two) in enumerate(pairs) if one != two), shorter)
