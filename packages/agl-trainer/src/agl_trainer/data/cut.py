"""Rows cut into passes that fit the memory, no token computed twice.

Rows that share a prefix and do not fit one pass together get a `Trunk`: their prefix is computed once and kept, with
all that its gradient needs, while the passes below it run on what it holds; see `trunk`. Loss and gradient are those of
one pass over all rows.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, zip_longest
from typing import Final, Generic

from agl_trainer.data.rows import Row

_WORTH = 32
"""Shared tokens below which computing them in each pass costs less than a pass of their own."""


@dataclass(frozen=True, slots=True)
class Trunk(Generic[Row]):
    """Tokens [start, end), which all rows of the parts below it begin with; those before `start` are there already."""

    row: Row
    start: int
    end: int
    parts: "Sequence[Part[Row]]"


Part = Trunk[Row] | list[Row]
"""A trunk, or the rows of a pass."""


Shape = tuple["Shape", ...]
"""Of parts: for each a `PASS`, or the shape of those on the trunk."""
PASS: Final[Shape] = ()


def cut(rows: Iterable[Row], pack_tokens: int) -> "list[Part[Row]]":
    """`rows` in passes that hold at most `pack_tokens` distinct tokens with the trunks below them; a single row may
    be longer than that."""
    ordered = sorted(rows, key=lambda row: list(row.token_ids))
    return _cut(ordered, 0, pack_tokens) if ordered else []


def padded_passes(rows: Iterable[Row], pack_tokens: int) -> list[list[Row]]:
    """The same for rows that are padded to the longest of their pass: similar lengths together."""
    passes: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row.token_ids)):
        # In this order the row is the longest of its pass.
        if passes and (len(passes[-1]) + 1) * len(row.token_ids) <= pack_tokens:
            passes[-1].append(row)
        else:
            passes.append([row])
    return passes


def shares(rows: Sequence[Row], count: int) -> list[list[Row]]:
    """`rows` in `count` lists of about as many distinct tokens each, those that share a prefix together."""
    ordered = sorted(rows, key=lambda row: list(row.token_ids))
    found: list[list[Row]] = [[] for _ in range(count)]
    total, done = _distinct(ordered, 0) if ordered else 0, 0
    for place, row in enumerate(ordered):
        new = len(row.token_ids) - (shared_length(ordered[place - 1], row) if place else 0)
        # By its middle: a long row goes where most of it belongs.
        found[min(int((done + new / 2) * count / total), count - 1)].append(row)
        done += new
    return found


def shape(parts: "Sequence[Part[Row]]") -> Shape:
    return tuple(shape(part.parts) if isinstance(part, Trunk) else PASS for part in parts)


def joined(shapes: Sequence[Shape]) -> Shape:
    """The smallest shape that has a place for each part of all `shapes`; a pass may take the first on a trunk."""
    return tuple(joined([inner for inner in place if inner is not None]) for place in zip_longest(*shapes))


def _cut(rows: list[Row], start: int, pack_tokens: int) -> "list[Part[Row]]":
    """Parts of sorted `rows`, whose first `start` tokens a trunk holds."""
    if len(rows) == 1 or start + _distinct(rows, start) <= pack_tokens:
        return [rows]
    shared = max(shared_length(rows[0], rows[-1]), start)
    if shared - start >= _WORTH:
        return [Trunk(rows[0], start, shared, _cut(rows, shared, pack_tokens))]
    branches = list(_branches(rows, shared))
    return _gather(branches, start, shared, pack_tokens) if len(branches) > 1 else [rows]


def _gather(branches: Iterable[list[Row]], start: int, shared: int, pack_tokens: int) -> "list[Part[Row]]":
    """Small neighbours together in one pass, what is too large cut further. Tokens [start, shared) are in each pass."""
    parts: list[Part[Row]] = []
    taken: list[Row] = []
    room = left = pack_tokens - shared
    for branch in branches:
        tokens = _distinct(branch, shared)
        if taken and tokens > left:
            parts.append(taken)
            taken, left = [], room
        if tokens > left:
            parts += _cut(branch, start, pack_tokens)
        else:
            taken, left = taken + branch, left - tokens
    return [*parts, taken] if taken else parts


def _branches(rows: Sequence[Row], depth: int) -> Iterator[list[Row]]:
    """Sorted rows by their token at `depth`; those that end there come first."""
    for _, branch in groupby(rows, key=lambda row: list(row.token_ids[depth : depth + 1])):
        yield list(branch)


def _distinct(rows: Sequence[Row], start: int) -> int:
    """Distinct tokens of sorted `rows` from `start` on: each adds what it does not share with the one before it."""
    shared = [start, *(max(shared_length(*pair), start) for pair in pairwise(rows))]
    return sum(len(row.token_ids) - known for row, known in zip(rows, shared, strict=True))


def shared_length(left: Row, right: Row) -> int:
    """How many tokens two rows begin with together."""
    pairs = zip(left.token_ids, right.token_ids, strict=False)
    longest = min(len(left.token_ids), len(right.token_ids))
    return next((place for place, (one, other) in enumerate(pairs) if one != other), longest)
