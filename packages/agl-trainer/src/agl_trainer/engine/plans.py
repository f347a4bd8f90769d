"""Attention plans of the engine: computing new prompt tokens, and one token of every running sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agl_trainer.attention import Block, attend_blocks
from agl_trainer.engine.kv import PrefixNode, PrefixTree, Slab
from agl_trainer.kernels import Scores


@dataclass(frozen=True, slots=True)
class _Seen:
    """Node whose keys the tokens [start, stop) of this pass see."""

    node: PrefixNode
    start: int
    stop: int


class PrefillPlan:
    """The pending tokens of prefix trees, depth first; keeps their keys and values in the nodes."""

    def __init__(self, trees: Sequence[tuple[str, PrefixTree]]) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.adapters: list[str] = []
        self._seen: list[_Seen] = []
        for adapter, tree in trees:
            for child in tree.root.children.values():
                self._visit(adapter, child)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        blocks = []
        for seen in self._seen:
            kept_key, kept_value = seen.node.kv[layer]
            if seen.node.pending:
                own = slice(seen.start, seen.start + len(seen.node.tokens))
                kept_key.copy_(key[:, own])
                kept_value.copy_(value[:, own])
            blocks.append(Block(seen.start, seen.stop, kept_key, kept_value, causal=seen.node.pending))
        return attend_blocks(query, blocks, scores.scale)[0]

    def finish(self) -> None:
        """Call after the pass: what was pending is now kept."""
        for seen in self._seen:
            seen.node.pending = False

    def _visit(self, adapter: str, node: PrefixNode) -> None:
        """Lay out the pending tokens under `node`; as deep as the tree, which turns of a conversation deepen."""
        start = len(self.tokens)
        if node.pending:
            self.tokens.extend(node.tokens)
            self.positions.extend(range(node.depth, node.depth + len(node.tokens)))
            self.adapters.extend([adapter] * len(node.tokens))
        for child in node.children.values():
            self._visit(adapter, child)
        if len(self.tokens) > start:
            self._seen.append(_Seen(node, start, len(self.tokens)))


class DecodePlan:
    """One new token for each of N sequences: shared prompt prefixes in the trees, the rest in the slab.

    Sequences come in an order in which those that share a prefix stand side by side (`order`). The scores of a shared
    run are one product for all that share it. All scores of a token stand in one row, first those of its prefix, then
    those of its slot, so that one softmax takes them.
    """

    def __init__(self, anchors: Sequence[PrefixNode], slots: Sequence[int], slab: Slab) -> None:
        """`anchors`: where the shared prefix of each sequence ends; `slots`: theirs, a permutation of 0..N-1."""
        self._slab = slab
        self._slots = torch.tensor(slots, device=slab.shape.device)
        self._in_slot = self._slots.argsort()
        """The sequence in each slot."""
        self._seen = _runs([anchor.path() for anchor in anchors])
        self._prefix = max(seen.node.depth + len(seen.node.tokens) for seen in self._seen) if self._seen else 0
        self._kept = self._slots
        self._hidden = torch.zeros(0)
        self._rows = torch.zeros(0)
        self._length = 0

    def feed(self, kept: Sequence[int]) -> None:
        """Prepare a pass; `kept`: how many tokens each sequence has in the slab before it."""
        self._kept = torch.tensor(kept, device=self._slots.device)
        self._length = max(kept) + 1
        self._slab.reserve(self._length)
        by_slot = self._kept[self._in_slot]
        hidden = torch.arange(self._length, device=by_slot.device) > by_slot[:, None]
        self._hidden = torch.zeros_like(hidden, dtype=self._slab.shape.dtype).masked_fill_(hidden, -torch.inf)
        self._rows = torch.zeros(0)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        keys, values = self._slab.layers[layer]
        keys[self._slots, :, self._kept] = key.transpose(0, 1)
        values[self._slots, :, self._kept] = value.transpose(0, 1)
        held = slice(0, len(self._slots)), slice(None), slice(0, self._length)
        query = query * scores.scale
        rows = self._room(query)
        for seen in self._seen:
            node_keys = seen.node.kv[layer, 0]
            scored = query[:, seen.start : seen.stop].flatten(1, 2) @ node_keys.mT
            self._columns(rows, seen).copy_(scored.view(len(scored), -1, query.shape[2], len(seen.node.tokens)))
        own = query.index_select(1, self._in_slot).transpose(0, 1) @ keys[held].mT
        rows[..., self._prefix :] = own.add_(self._hidden[:, None, None]).index_select(0, self._slots).transpose(0, 1)
        weights = rows.softmax(-1)
        own = weights[..., self._prefix :].index_select(1, self._in_slot).transpose(0, 1) @ values[held]
        out = own.transpose(0, 1).index_select(1, self._slots)
        for seen in self._seen:
            taken = self._columns(weights, seen).flatten(1, 2)
            out[:, seen.start : seen.stop].view(len(out), -1, out.shape[3]).baddbmm_(taken, seen.node.kv[layer, 1])
        return out

    def _room(self, query: Tensor) -> Tensor:
        """[Hkv, N, G, columns]; -inf for ever where a sequence has no shared prefix."""
        if not len(self._rows):
            shape = (*query.shape[:3], self._prefix + self._length)
            self._rows = query.new_full(shape, -torch.inf)
        return self._rows

    def _columns(self, rows: Tensor, seen: _Seen) -> Tensor:
        """View [Hkv, Q, G, S] of what the sequences of `seen` have for its node in `rows` [Hkv, N, G, columns]."""
        start = seen.node.depth
        return rows[:, seen.start : seen.stop, :, start : start + len(seen.node.tokens)]


def order(sequences: Sequence[tuple[str, PrefixNode]]) -> list[int]:
    """Indices of `sequences` (adapter, anchor) so that one adapter's are neighbours, and those under a common node."""
    ranks: dict[PrefixNode, int] = {}
    places = [
        (adapter, [ranks.setdefault(node, len(ranks)) for node in anchor.path()]) for adapter, anchor in sequences
    ]
    return sorted(range(len(sequences)), key=lambda index: places[index])


def _runs(paths: Sequence[Sequence[PrefixNode]]) -> list[_Seen]:
    """For each node, the run of neighbouring sequences whose path holds it."""
    open_runs: dict[PrefixNode, int] = {}
    seen: list[_Seen] = []
    for index, path in enumerate([*paths, []]):
        for node in [node for node in open_runs if node not in path]:
            seen.append(_Seen(node, open_runs.pop(node), index))
        for node in path:
            open_runs.setdefault(node, index)
    return seen
