"""Keys and values that the engine keeps: a prefix tree for prompts, a slab for the tokens being sampled."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KvShape:
    """What a token's keys and values take in a model."""

    layers: int
    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device

    def empty(self, tokens: int) -> Tensor:
        """[layers, 2, heads, tokens, width]; index 0 of the second axis holds keys, 1 values."""
        return torch.empty(self.layers, 2, self.heads, tokens, self.width, dtype=self.dtype, device=self.device)


@dataclass(slots=True, eq=False)
class PrefixNode:
    """A run of prompt tokens with their keys and values. `pending`: they are not computed yet."""

    tokens: list[int]
    kv: Tensor
    depth: int
    parent: "PrefixNode | None" = None
    children: dict[int, "PrefixNode"] = field(default_factory=dict)
    pending: bool = True
    users: int = 0
    last_used: int = 0

    @property
    def end(self) -> int:
        """Tokens from the first of the prompt to the last of this run."""
        return self.depth + len(self.tokens)

    def split_path(self, is_shared: Callable[["PrefixNode"], bool]) -> tuple["PrefixNode", list["PrefixNode"]]:
        """The last node on the path that `is_shared` (else the root), and the nodes after it."""
        node, tail = self, []
        while node.parent is not None and not is_shared(node):
            tail.append(node)
            node = node.parent
        return node, tail[::-1]

    def path(self) -> list["PrefixNode"]:
        """Nodes from the first below the root to this one."""
        node, nodes = self, []
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class PrefixTree:
    """Prompts of one adapter version; a prefix shared by many prompts is computed and kept once."""

    def __init__(self, shape: KvShape) -> None:
        self._shape = shape
        self._clock = itertools.count(1)
        self.root = PrefixNode(tokens=[], kv=shape.empty(0), depth=0, pending=False)
        self.size = 0
        """Tokens kept."""

    def insert(self, tokens: Sequence[int]) -> PrefixNode:
        """The node that ends with the last of `tokens`, held until `release`; what is missing is added as pending."""
        node, depth = self.root, 0
        while depth < len(tokens):
            child = node.children.get(tokens[depth])
            if child is None:
                child = self._grow(node, list(tokens[depth:]))
            shared = _shared(child.tokens, tokens, depth)
            node = child if shared == len(child.tokens) else self._split(child, shared)
            depth += shared
        node.users += 1
        node.last_used = next(self._clock)
        return node

    def release(self, node: PrefixNode) -> None:
        """Let go of a node that `insert` returned."""
        node.users -= 1
        node.last_used = next(self._clock)

    def shrink(self, size: int) -> None:
        """Drop the leaves used longest ago, but never one in use, until at most `size` tokens are kept."""
        while self.size > size:
            free = [node for node in self.nodes() if not node.children and not node.users]
            if not free:
                return
            oldest = min(free, key=lambda node: node.last_used)
            assert oldest.parent is not None
            del oldest.parent.children[oldest.tokens[0]]
            self.size -= len(oldest.tokens)

    def nodes(self) -> Iterator[PrefixNode]:
        """Every node below the root."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _grow(self, parent: PrefixNode, tokens: list[int]) -> PrefixNode:
        node = PrefixNode(tokens, self._shape.empty(len(tokens)), parent.end, parent)
        parent.children[tokens[0]] = node
        self.size += len(tokens)
        return node

    def _split(self, node: PrefixNode, at: int) -> PrefixNode:
        """Cut `node` after `at` tokens and return the new upper part.

        The lower part stays the same object, because running sequences hold it.
        """
        assert node.parent is not None
        upper = PrefixNode(
            node.tokens[:at],
            node.kv[:, :, :, :at],
            node.depth,
            node.parent,
            pending=node.pending,
            last_used=node.last_used,
        )
        node.parent.children[upper.tokens[0]] = upper
        node.tokens, node.kv, node.depth, node.parent = node.tokens[at:], node.kv[:, :, :, at:], node.depth + at, upper
        upper.children[node.tokens[0]] = node
        return upper


def _shared(run: Sequence[int], tokens: Sequence[int], offset: int) -> int:
    """How many tokens of `run` stand at `offset` of `tokens`."""
    longest = min(len(run), len(tokens) - offset)
    return next((i for i in range(longest) if run[i] != tokens[offset + i]), longest)


class Slab:
    """Keys and values that belong to one running sequence each, one slot a sequence."""

    def __init__(self, shape: KvShape, slots: int) -> None:
        self.shape = shape
        self._slots = slots
        self._capacity = 0
        self.layers: list[tuple[Tensor, Tensor]] = []
        """For each layer, keys and values [slots, heads, capacity, width]."""
        self.reserve(32)

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens in each slot; doubles, so that growing stays cheap."""
        if length <= self._capacity:
            return
        capacity = max(length, 2 * self._capacity)
        self.layers = [tuple(self._grown(old, capacity) for old in pair) for pair in self.layers or self._nothing()]  # type: ignore[misc]  # a pair stays a pair
        self._capacity = capacity

    def fill(self, slot: int, nodes: Sequence[PrefixNode]) -> int:
        """Copy the tokens of `nodes` to the start of `slot`; returns how many there are."""
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

    def forget(self, slot: int, count: int, kept: int) -> None:
        """Drop the first `count` of the `kept` tokens in `slot`."""
        for tensor in itertools.chain.from_iterable(self.layers):
            tensor[slot, :, : kept - count] = tensor[slot, :, count:kept].clone()

    def move(self, source: int, target: int) -> None:
        """Copy slot `source` over slot `target`."""
        for keys, values in self.layers:
            keys[target] = keys[source]
            values[target] = values[source]

    def _nothing(self) -> list[tuple[Tensor, Tensor]]:
        empty = self._room(0)
        return [(empty, empty)] * self.shape.layers

    def _room(self, capacity: int) -> Tensor:
        # Zeros, not empty: weights of unused places are 0, and 0 times a leftover NaN would be NaN.
        shape = (self._slots, self.shape.heads, capacity, self.shape.width)
        return torch.zeros(shape, dtype=self.shape.dtype, device=self.shape.device)

    def _grown(self, old: Tensor, capacity: int) -> Tensor:
        new = self._room(capacity)
        new[:, :, : old.shape[2]] = old
        return new
