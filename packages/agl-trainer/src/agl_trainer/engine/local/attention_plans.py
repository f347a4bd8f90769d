"""Attention plans of the engine: prefill of new prompt tokens, and decoding of one token per running sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agl_trainer.engine.local.prefix_tree import PrefixNode, PrefixTree
from agl_trainer.engine.local.slot_cache import SlotCache
from agl_trainer.model.block_attention import ScoreOptions, attention_with_lse, empty_attention, merge_block


@dataclass(frozen=True, slots=True)
class _NodeReaders:
    """A node and the queries [start, stop) of the pass that attend to its keys."""

    node: PrefixNode
    start: int
    stop: int


class PrefillPlan:
    """Computes the pending tokens of prefix trees, in depth-first order, and stores their keys and values."""

    def __init__(self, trees: Sequence[tuple[str, PrefixTree]]) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.adapters: list[str] = []
        self._readers: list[_NodeReaders] = []
        for adapter, tree in trees:
            for child in tree.root.children.values():
                self._add(adapter, child)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> Tensor:
        out, lse = empty_attention(query)
        for readers in self._readers:
            node = readers.node
            if node.pending:
                own = slice(readers.start, readers.start + len(node.tokens))
                node_key, node_value = node.kv[layer]
                node_key.copy_(key[:, own])
                node_value.copy_(value[:, own])
                block = _attend_causally(query[:, own], node.kv[layer], options.scale)
                merge_block(out[:, own], lse[:, own], *block)
            below = slice(readers.start + len(node.tokens) * node.pending, readers.stop)
            if below.start < below.stop:
                block = _attend_node(query[:, below], node.kv[layer], options.scale)
                merge_block(out[:, below], lse[:, below], *block)
        return out

    def finish(self) -> None:
        """Mark the nodes as computed; to be called after the pass."""
        for readers in self._readers:
            readers.node.pending = False

    def _add(self, adapter: str, node: PrefixNode) -> None:
        """Append the pending tokens of `node` and its descendants. Recurses as deep as a conversation has turns."""
        start = len(self.tokens)
        if node.pending:
            self.tokens.extend(node.tokens)
            self.positions.extend(range(node.depth, node.end))
            self.adapters.extend([adapter] * len(node.tokens))
        for child in node.children.values():
            self._add(adapter, child)
        if len(self.tokens) > start:
            self._readers.append(_NodeReaders(node, start, len(self.tokens)))


class DecodePlan:
    """Decodes one token for each of N sequences, which read shared prompt prefixes from the trees, the rest from slots.

    Sequences that share a prefix are adjacent (`prefix_order`). A shared run is read once for all of them, and merged
    with the attention of each to its slot.
    """

    def __init__(self, anchors: Sequence[PrefixNode], slots: Sequence[int], cache: SlotCache) -> None:
        """`anchors`: last shared node of each sequence; `slots`: slot of each sequence, a permutation of 0..N-1."""
        self._cache = cache
        self._slots = torch.tensor(slots, device=cache.shape.device)
        self._sequence_of_slot = self._slots.argsort()
        self._readers = _find_readers([anchor.path() for anchor in anchors])
        self._lengths = self._slots
        self._mask = torch.zeros(0)
        self._length = 0

    def prepare(self, lengths: Sequence[int]) -> None:
        """Prepare a pass; `lengths`: tokens in the slot of each sequence before the pass."""
        self._lengths = torch.tensor(lengths, device=self._slots.device)
        self._length = max(lengths) + 1
        self._cache.reserve(self._length)
        by_slot = self._lengths[self._sequence_of_slot]
        hidden = torch.arange(self._length, device=by_slot.device) > by_slot[:, None]
        self._mask = torch.zeros_like(hidden, dtype=self._cache.shape.dtype).masked_fill_(hidden, -torch.inf)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> Tensor:
        out, lse = self._attend_own(layer, query, key, value, options.scale)
        for readers in self._readers:
            run = slice(readers.start, readers.stop)
            merge_block(out[:, run], lse[:, run], *_attend_node(query[:, run], readers.node.kv[layer], options.scale))
        return out

    def _attend_own(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Append the new token of each sequence to its slot, then attend to the slot."""
        keys, values = self._cache.layers[layer]
        keys[self._slots, :, self._lengths] = key.transpose(0, 1)
        values[self._slots, :, self._lengths] = value.transpose(0, 1)
        used = slice(0, len(self._slots)), slice(None), slice(0, self._length)
        by_slot = query.transpose(0, 1).index_select(0, self._sequence_of_slot)
        mask = self._mask[:, None, None].expand(-1, 1, by_slot.shape[2], -1)
        out, lse = attention_with_lse(by_slot, keys[used], values[used], scale, mask=mask)
        return out.index_select(0, self._slots).transpose(0, 1), lse.index_select(0, self._slots).transpose(0, 1)


def _attend_node(query: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [Hkv, Q, G, D] and LSE [Hkv, Q, G] of queries [Hkv, Q, G, D] on all tokens of a node [2, Hkv, S, D]."""
    out, lse = attention_with_lse(query.flatten(1, 2)[None], kv[0][None], kv[1][None], scale)
    return out.view(query.shape), lse.view(query.shape[:3])


def _attend_causally(query: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `_attend_node`, for the queries of the node's own tokens, with a causal mask."""
    key, value = kv[:, :, None].expand(-1, -1, query.shape[2], -1, -1)
    out, lse = attention_with_lse(query.transpose(1, 2), key, value, scale, is_causal=True)
    return out.transpose(1, 2), lse.transpose(1, 2)


def prefix_order(sequences: Sequence[tuple[str, PrefixNode]]) -> list[int]:
    """Order of `sequences` (adapter, anchor) in which those of one adapter, and those of one node, are adjacent."""
    ranks: dict[PrefixNode, int] = {}
    keys = [(adapter, [ranks.setdefault(node, len(ranks)) for node in anchor.path()]) for adapter, anchor in sequences]
    return sorted(range(len(sequences)), key=lambda index: keys[index])


def _find_readers(paths: Sequence[Sequence[PrefixNode]]) -> list[_NodeReaders]:
    """For each node, the run of adjacent sequences whose path contains it."""
    starts: dict[PrefixNode, int] = {}
    readers: list[_NodeReaders] = []
    for index, path in enumerate([*paths, []]):
        for node in [node for node in starts if node not in path]:
            readers.append(_NodeReaders(node, starts.pop(node), index))
        for node in path:
            starts.setdefault(node, index)
    return readers
