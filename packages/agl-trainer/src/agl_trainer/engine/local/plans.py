"""Attention plans of the engine: computing new prompt tokens, and one token of every running sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agl_trainer.engine.local.kv import PrefixNode, PrefixTree, Slab
from agl_trainer.model.attention_parts import Scores, attend_rows, join, nothing_seen


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
        out, normaliser = nothing_seen(query)
        for seen in self._seen:
            if seen.node.pending:
                own = slice(seen.start, seen.start + len(seen.node.tokens))
                kept_key, kept_value = seen.node.kv[layer]
                kept_key.copy_(key[:, own])
                kept_value.copy_(value[:, own])
                found = _attend_itself(query[:, own], seen.node.kv[layer], scores.scale)
                join(out[:, own], normaliser[:, own], *found)
            below = slice(seen.start + len(seen.node.tokens) * seen.node.pending, seen.stop)
            if below.start < below.stop:
                found = _attend_node(query[:, below], seen.node.kv[layer], scores.scale)
                join(out[:, below], normaliser[:, below], *found)
        return out

    def finish(self) -> None:
        """Call after the pass: what was pending is now kept."""
        for seen in self._seen:
            seen.node.pending = False

    def _visit(self, adapter: str, node: PrefixNode) -> None:
        """Lay out the pending tokens under `node`; as deep as the tree, which turns of a conversation deepen."""
        start = len(self.tokens)
        if node.pending:
            self.tokens.extend(node.tokens)
            self.positions.extend(range(node.depth, node.end))
            self.adapters.extend([adapter] * len(node.tokens))
        for child in node.children.values():
            self._visit(adapter, child)
        if len(self.tokens) > start:
            self._seen.append(_Seen(node, start, len(self.tokens)))


class DecodePlan:
    """One new token for each of N sequences: shared prompt prefixes in the trees, the rest in the slab.

    Sequences come in an order in which those that share a prefix stand side by side (`order`). A shared run is read
    once for all that share it, and joined with what each has in its slot.
    """

    def __init__(self, anchors: Sequence[PrefixNode], slots: Sequence[int], slab: Slab) -> None:
        """`anchors`: where the shared prefix of each sequence ends; `slots`: theirs, a permutation of 0..N-1."""
        self._slab = slab
        self._slots = torch.tensor(slots, device=slab.shape.device)
        self._in_slot = self._slots.argsort()
        """The sequence in each slot."""
        self._seen = _runs([anchor.path() for anchor in anchors])
        self._kept = self._slots
        self._hidden = torch.zeros(0)
        self._length = 0

    def feed(self, kept: Sequence[int]) -> None:
        """Prepare a pass; `kept`: how many tokens each sequence has in the slab before it."""
        self._kept = torch.tensor(kept, device=self._slots.device)
        self._length = max(kept) + 1
        self._slab.reserve(self._length)
        by_slot = self._kept[self._in_slot]
        hidden = torch.arange(self._length, device=by_slot.device) > by_slot[:, None]
        self._hidden = torch.zeros_like(hidden, dtype=self._slab.shape.dtype).masked_fill_(hidden, -torch.inf)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        out, normaliser = self._attend_slots(layer, query, key, value, scores.scale)
        for seen in self._seen:
            run = slice(seen.start, seen.stop)
            join(out[:, run], normaliser[:, run], *_attend_node(query[:, run], seen.node.kv[layer], scores.scale))
        return out

    def _attend_slots(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """What each sequence makes of its slot, once its new token is there."""
        keys, values = self._slab.layers[layer]
        keys[self._slots, :, self._kept] = key.transpose(0, 1)
        values[self._slots, :, self._kept] = value.transpose(0, 1)
        held = slice(0, len(self._slots)), slice(None), slice(0, self._length)
        asked = query.transpose(0, 1).index_select(0, self._in_slot)
        mask = self._hidden[:, None, None].expand(-1, 1, asked.shape[2], -1)
        out, normaliser = attend_rows(asked, keys[held], values[held], scale, mask=mask)
        return out.index_select(0, self._slots).transpose(0, 1), normaliser.index_select(0, self._slots).transpose(0, 1)


def _attend_node(query: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [Hkv, Q, G, D] and log-sum-exp [Hkv, Q, G] of queries [Hkv, Q, G, D] on all of a node [2, Hkv, S, D]."""
    out, normaliser = attend_rows(query.flatten(1, 2)[None], kv[0][None], kv[1][None], scale)
    return out.view(query.shape), normaliser.view(query.shape[:3])


def _attend_itself(query: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `_attend_node` for the tokens of the node itself, which see each other causally."""
    key, value = kv[:, :, None].expand(-1, -1, query.shape[2], -1, -1)
    out, normaliser = attend_rows(query.transpose(1, 2), key, value, scale, is_causal=True)
    return out.transpose(1, 2), normaliser.transpose(1, 2)


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
