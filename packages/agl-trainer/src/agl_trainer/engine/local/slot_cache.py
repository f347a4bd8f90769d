"""KV cache of running sequences: one slot per sequence, for the tokens that it does not share."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from agl_trainer.engine.local.prefix_tree import KvShape, PrefixNode


class SlotCache:
    """Keys and values of each slot, in tensors that all slots share and that grow with the longest sequence."""

    def __init__(self, shape: KvShape, slots: int) -> None:
        self.shape = shape
        self._slots = slots
        self._capacity = 0
        self.layers: list[tuple[Tensor, Tensor]] = []
        """Keys and values [slots, kv_heads, capacity, head_dim] of each layer."""
        self.reserve(32)

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens per slot. The capacity at least doubles, which bounds the cost of copying."""
        if length <= self._capacity:
            return
        capacity = max(length, 2 * self._capacity)
        empty = self._zeros(0)
        layers = self.layers or [(empty, empty)] * self.shape.layers
        self.layers = [(self._enlarge(keys, capacity), self._enlarge(values, capacity)) for keys, values in layers]
        self._capacity = capacity

    def fill(self, slot: int, nodes: Sequence[PrefixNode]) -> int:
        """Copy the tokens of `nodes` to the start of `slot`; returns their number."""
        length = sum(len(node.tokens) for node in nodes)
        self.reserve(length)
        start = 0
        for node in nodes:
            end = start + len(node.tokens)
            for (keys, values), (node_keys, node_values) in zip(self.layers, node.kv, strict=True):
                keys[slot, :, start:end] = node_keys
                values[slot, :, start:end] = node_values
            start = end
        return length

    def drop_first(self, slot: int, count: int, length: int) -> None:
        """Remove the first `count` of the `length` tokens in `slot`."""
        for tensor in itertools.chain.from_iterable(self.layers):
            tensor[slot, :, : length - count] = tensor[slot, :, count:length].clone()

    def move(self, source: int, target: int) -> None:
        """Copy slot `source` over slot `target`."""
        for keys, values in self.layers:
            keys[target] = keys[source]
            values[target] = values[source]

    def _zeros(self, capacity: int) -> Tensor:
        # Zeros, not empty: weights of unused tokens are 0, and 0 times a leftover NaN would be NaN.
        shape = (self._slots, self.shape.kv_heads, capacity, self.shape.head_dim)
        return torch.zeros(shape, dtype=self.shape.dtype, device=self.shape.device)

    def _enlarge(self, old: Tensor, capacity: int) -> Tensor:
        new = self._zeros(capacity)
        new[:, :, : old.shape[2]] = old
        return new
