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

    Sequences come in an order in which those that share a prefix stand side by side (`order`).
    """

    def __init__(self, anchors: Sequence[PrefixNode], slots: Sequence[int], slab: Slab) -> None:
        """`anchors`: where the shared prefix of each sequence ends; `slots`: theirs, a permutation of 0..N-1."""
        self._slab = slab
        self._slots = torch.tensor(slots)
        self._seen = _runs([anchor.path() for anchor in anchors])
        self._kept = torch.zeros(len(slots), dtype=torch.int64)
        self._hidden = torch.zeros(len(slots), 0, dtype=torch.bool)
        self._length = 0

    def feed(self, kept: Sequence[int]) -> None:
        """Prepare a pass; `kept`: how many tokens each sequence has in the slab before it."""
        self._kept = torch.tensor(kept)
        self._length = max(kept) + 1
        self._slab.reserve(self._length)
        self._hidden = torch.empty(len(kept), self._length, dtype=torch.bool)
        self._hidden[self._slots] = torch.arange(self._length) > self._kept[:, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        count = query.shape[1]
        keys, values = self._slab.layers[layer]
        keys[self._slots, :, self._kept] = key.transpose(0, 1)
        values[self._slots, :, self._kept] = value.transpose(0, 1)
        by_slot = torch.empty_like(query.transpose(0, 1), memory_format=torch.contiguous_format)
        by_slot[self._slots] = query.transpose(0, 1)
        own = by_slot @ keys[:count, :, : self._length].mT
        own = own.mul_(scores.scale).masked_fill_(self._hidden[:, None, None], -torch.inf)
        own_normaliser = own.logsumexp(-1)
        own_out = (own.sub_(own_normaliser[..., None]).exp_()) @ values[:count, :, : self._length]
        if not self._seen:
            return own_out[self._slots].transpose(0, 1)
        shared_out, shared_normaliser = attend_blocks(query, self._blocks(layer), scores.scale)
        # Two softmax parts joined by their log-sum-exp; sigmoid(a - b) is the share of the part with a.
        share = torch.sigmoid(own_normaliser[self._slots].transpose(0, 1) - shared_normaliser)[..., None]
        return shared_out.lerp_(own_out[self._slots].transpose(0, 1), share)

    def _blocks(self, layer: int) -> list[Block]:
        return [Block(seen.start, seen.stop, *seen.node.kv[layer], causal=False) for seen in self._seen]


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
