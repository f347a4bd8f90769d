"""Rows that share token prefixes, packed so that every distinct token is computed once.

A trie of token ids is cut into *segments*: runs of tokens without a branch. Laid out depth first, a segment is
followed directly by its whole subtree, so "which queries see this segment's keys" is one slice: itself (causally) and
everything up to the end of its subtree (fully). Attention over the trie is therefore a list of rectangles, see
`attention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens [start, end) in the packed order; its descendants are [end, subtree_end)."""

    start: int
    end: int
    subtree_end: int


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows as one sequence of N distinct tokens, depth first."""

    token_ids: torch.Tensor
    """[N] int64."""
    positions: torch.Tensor
    """[N] int64: depth of a token in its row."""
    segments: tuple[Segment, ...]
    """Parents before children."""
    row_index: tuple[torch.Tensor, ...]
    """For each row, in the order given, the packed position of each of its tokens: [T] int64."""

    def to(self, device: torch.device) -> "PackedRows":
        index = tuple(places.to(device) for places in self.row_index)
        return PackedRows(self.token_ids.to(device), self.positions.to(device), self.segments, index)


def pad_rows(rows: Sequence[Sequence[int]]) -> PackedRows:
    """`rows` as they are, one behind the other, each padded to the longest by token 0; there are no segments."""
    longest = max(len(row) for row in rows)
    starts = range(0, longest * len(rows), longest)
    return PackedRows(
        token_ids=torch.tensor([token for row in rows for token in (*row, *[0] * (longest - len(row)))]),
        positions=torch.arange(longest).repeat(len(rows)),
        segments=(),
        row_index=tuple(torch.arange(start, start + len(row)) for start, row in zip(starts, rows, strict=True)),
    )


@dataclass(slots=True)
class _Node:
    """Half-open run [begin, end) of the tokens of `row`, where that run was first seen."""

    row: int
    begin: int
    end: int
    children: dict[int, "_Node"] = field(default_factory=dict)
    packed_start: int = 0


def pack_rows(rows: Sequence[Sequence[int]]) -> PackedRows:
    """Pack `rows` of token ids. Raises ValueError for an empty row."""
    if any(not row for row in rows):
        raise ValueError(f"row {next(i for i, row in enumerate(rows) if not row)} has no tokens")
    root = _Node(row=0, begin=0, end=0)
    for index, row in enumerate(rows):
        _insert(root, rows, index, row)
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    for child in root.children.values():
        _lay_out(child, rows, tokens, positions, segments)
    return PackedRows(
        token_ids=torch.tensor(tokens),
        positions=torch.tensor(positions),
        segments=tuple(segments),
        row_index=tuple(_find(root, row) for row in rows),
    )


def _insert(root: _Node, rows: Sequence[Sequence[int]], index: int, row: Sequence[int]) -> None:
    node, depth = root, 0
    while depth < len(row):
        child = node.children.get(row[depth])
        if child is None:
            node.children[row[depth]] = _Node(row=index, begin=depth, end=len(row))
            return
        shared = _shared_length(rows[child.row], row, depth, min(child.end, len(row)))
        if shared < child.end:
            _split(child, rows, shared)
        node, depth = child, shared


def _shared_length(left: Sequence[int], right: Sequence[int], begin: int, end: int) -> int:
    """First position in [begin, end) where the two differ, else `end`."""
    return next((i for i in range(begin, end) if left[i] != right[i]), end)


def _split(node: _Node, rows: Sequence[Sequence[int]], at: int) -> None:
    """Cut `node` at depth `at`; what lies behind becomes its only child."""
    rest = _Node(row=node.row, begin=at, end=node.end, children=node.children)
    node.end, node.children = at, {rows[node.row][at]: rest}


def _lay_out(
    top: _Node, rows: Sequence[Sequence[int]], tokens: list[int], positions: list[int], segments: list[Segment]
) -> None:
    """Append the subtree of `top` depth first. A loop, not recursion: a chain of turns may be deep."""
    stack: list[tuple[_Node, int | None]] = [(top, None)]
    while stack:
        node, slot = stack.pop()
        if slot is not None:
            segments[slot] = Segment(segments[slot].start, segments[slot].end, len(tokens))
            continue
        node.packed_start = len(tokens)
        tokens.extend(rows[node.row][node.begin : node.end])
        positions.extend(range(node.begin, node.end))
        stack.append((node, len(segments)))
        segments.append(Segment(node.packed_start, len(tokens), len(tokens)))
        stack.extend((child, None) for child in reversed(node.children.values()))


def _find(root: _Node, row: Sequence[int]) -> torch.Tensor:
    """Packed positions of the tokens of `row`."""
    pieces: list[torch.Tensor] = []
    node, depth = root, 0
    while depth < len(row):
        node = node.children[row[depth]]
        pieces.append(torch.arange(node.packed_start, node.packed_start + node.end - node.begin))
        depth = node.end
    return torch.cat(pieces)
