"""Rows that share token prefixes, packed as a prefix tree, so that every distinct token is computed once.

The tree is divided into *segments*: runs of tokens without a branch. Depth first, a segment is followed directly by its
whole subtree, so the queries that attend to its keys are one slice: the segment itself (causally) and everything up to
the end of its subtree (fully). Attention over the tree is therefore a list of rectangles; see `model.attention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, end) in packed order without a branch; their descendants are [end, subtree_end)."""

    start: int
    end: int
    subtree_end: int


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows as one sequence of N distinct tokens, depth first."""

    token_ids: torch.Tensor
    """[N] int64."""
    positions: torch.Tensor
    """[N] int64: index of the token in its row."""
    segments: tuple[Segment, ...]
    """Parents before children."""
    row_index: tuple[torch.Tensor, ...]
    """For each row, in the given order, the packed index of each of its tokens: [T] int64, on the CPU."""

    def to(self, device: torch.device) -> "PackedRows":
        """With the tensors that models read on `device`; `row_index` stays on the CPU."""
        return replace(self, token_ids=self.token_ids.to(device), positions=self.positions.to(device))


def pad_rows(rows: Sequence[Sequence[int]]) -> PackedRows:
    """`rows` one after the other, each padded with token 0 to the longest; without segments."""
    longest = max(len(row) for row in rows)
    starts = range(0, longest * len(rows), longest)
    return PackedRows(
        token_ids=torch.tensor([token for row in rows for token in (*row, *[0] * (longest - len(row)))]),
        positions=torch.arange(longest).repeat(len(rows)),
        segments=(),
        row_index=tuple(torch.arange(start, start + len(row)) for start, row in zip(starts, rows, strict=True)),
    )


@dataclass(slots=True)
class _TreeNode:
    """Tokens [begin, end) of `row`, the first row that has them at this place of the tree."""

    row: int
    begin: int
    end: int
    children: dict[int, "_TreeNode"] = field(default_factory=dict)
    packed_start: int = 0


def pack_rows(rows: Sequence[Sequence[int]]) -> PackedRows:
    """Pack `rows` of token ids as a prefix tree. Raises ValueError for an empty row."""
    if any(not row for row in rows):
        raise ValueError(f"row {next(i for i, row in enumerate(rows) if not row)} has no tokens")
    root = _TreeNode(row=0, begin=0, end=0)
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


def _insert(root: _TreeNode, rows: Sequence[Sequence[int]], index: int, row: Sequence[int]) -> None:
    node, depth = root, 0
    while depth < len(row):
        child = node.children.get(row[depth])
        if child is None:
            node.children[row[depth]] = _TreeNode(row=index, begin=depth, end=len(row))
            return
        shared = _shared_length(rows[child.row], row, depth, min(child.end, len(row)))
        if shared < child.end:
            _split(child, rows, shared)
        node, depth = child, shared


def _shared_length(left: Sequence[int], right: Sequence[int], begin: int, end: int) -> int:
    """First index in [begin, end) at which the rows differ, else `end`."""
    return next((i for i in range(begin, end) if left[i] != right[i]), end)


def _split(node: _TreeNode, rows: Sequence[Sequence[int]], at: int) -> None:
    """Split `node` at depth `at`; the later tokens become its only child."""
    rest = _TreeNode(row=node.row, begin=at, end=node.end, children=node.children)
    node.end, node.children = at, {rows[node.row][at]: rest}


def _lay_out(
    top: _TreeNode, rows: Sequence[Sequence[int]], tokens: list[int], positions: list[int], segments: list[Segment]
) -> None:
    """Append the subtree of `top` depth first. Not recursive: a conversation of many turns is deep."""
    stack: list[tuple[_TreeNode, int | None]] = [(top, None)]
    while stack:
        node, segment = stack.pop()
        if segment is not None:
            segments[segment] = replace(segments[segment], subtree_end=len(tokens))
            continue
        node.packed_start = len(tokens)
        tokens.extend(rows[node.row][node.begin : node.end])
        positions.extend(range(node.begin, node.end))
        stack.append((node, len(segments)))
        segments.append(Segment(node.packed_start, len(tokens), len(tokens)))
        stack.extend((child, None) for child in reversed(node.children.values()))


def _find(root: _TreeNode, row: Sequence[int]) -> torch.Tensor:
    """Packed indices of the tokens of `row`."""
    pieces: list[torch.Tensor] = []
    node, depth = root, 0
    while depth < len(row):
        node = node.children[row[depth]]
        pieces.append(torch.arange(node.packed_start, node.packed_start + node.end - node.begin))
        depth = node.end
    return torch.cat(pieces)
