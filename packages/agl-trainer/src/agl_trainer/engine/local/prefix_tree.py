"""KV cache of prompts: a prefix tree, in which a prefix that several prompts share is computed and kept once."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KvShape:
    """Shape of a model's keys and values."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def empty(self, tokens: int) -> Tensor:
        """Uninitialized [layers, 2, kv_heads, tokens, head_dim]; the second axis is (keys, values)."""
        shape = (self.layers, 2, self.kv_heads, tokens, self.head_dim)
        return torch.empty(shape, dtype=self.dtype, device=self.device)


@dataclass(slots=True, eq=False)
class PrefixNode:
    """A run of prompt tokens with their keys and values, which are not computed yet while `pending`."""

    tokens: list[int]
    kv: Tensor
    depth: int
    """Tokens of the prompt before this run."""
    parent: "PrefixNode | None" = None
    children: dict[int, "PrefixNode"] = field(default_factory=dict)
    """By first token."""
    pending: bool = True
    users: int = 0
    """Sequences whose prompt ends here and that have not been released."""
    last_used: int = 0

    @property
    def end(self) -> int:
        """Tokens of the prompt up to the end of this run."""
        return self.depth + len(self.tokens)

    def split_path(self, is_shared: Callable[["PrefixNode"], bool]) -> tuple["PrefixNode", list["PrefixNode"]]:
        """The last node on the path from the root that `is_shared` (or the root), and the nodes after it."""
        node, tail = self, []
        while node.parent is not None and not is_shared(node):
            tail.append(node)
            node = node.parent
        return node, tail[::-1]

    def path(self) -> list["PrefixNode"]:
        """Nodes from below the root to this one."""
        return self.split_path(lambda _: False)[1]


class PrefixTree:
    """The prompts of one adapter version."""

    def __init__(self, shape: KvShape) -> None:
        self._shape = shape
        self._clock = itertools.count(1)
        self.root = PrefixNode(tokens=[], kv=shape.empty(0), depth=0, pending=False)
        self.size = 0
        """Number of tokens in the tree."""

    def insert(self, tokens: Sequence[int]) -> PrefixNode:
        """The node at which `tokens` end, in use until `release`. Tokens that the tree lacks are added as pending."""
        node, depth = self.root, 0
        while depth < len(tokens):
            child = node.children.get(tokens[depth])
            if child is None:
                child = self._add_child(node, list(tokens[depth:]))
            common = _common_length(child.tokens, tokens, depth)
            node = child if common == len(child.tokens) else self._split(child, common)
            depth += common
        node.users += 1
        node.last_used = next(self._clock)
        return node

    def release(self, node: PrefixNode) -> None:
        """End the use of a node that `insert` returned."""
        node.users -= 1
        node.last_used = next(self._clock)

    def shrink(self, size: int) -> None:
        """Remove the least recently used leaves until at most `size` tokens are left; leaves in use are kept."""
        while self.size > size:
            free = [node for node in self.nodes() if not node.children and not node.users]
            if not free:
                return
            oldest = min(free, key=lambda node: node.last_used)
            assert oldest.parent is not None
            del oldest.parent.children[oldest.tokens[0]]
            self.size -= len(oldest.tokens)

    def nodes(self) -> Iterator[PrefixNode]:
        """Every node except the root."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _add_child(self, parent: PrefixNode, tokens: list[int]) -> PrefixNode:
        node = PrefixNode(tokens, self._shape.empty(len(tokens)), parent.end, parent)
        parent.children[tokens[0]] = node
        self.size += len(tokens)
        return node

    def _split(self, node: PrefixNode, at: int) -> PrefixNode:
        """Split `node` after `at` tokens; returns the new upper part. Sequences refer to `node`, the lower part."""
        assert node.parent is not None
        upper = PrefixNode(node.tokens[:at], node.kv[:, :, :, :at], node.depth, node.parent, pending=node.pending)
        upper.last_used = node.last_used
        node.parent.children[upper.tokens[0]] = upper
        node.tokens, node.kv, node.depth, node.parent = node.tokens[at:], node.kv[:, :, :, at:], node.depth + at, upper
        upper.children[node.tokens[0]] = node
        return upper


def _common_length(run: Sequence[int], tokens: Sequence[int], offset: int) -> int:
    """Length of the common prefix of `run` and `tokens[offset:]`."""
    longest = min(len(run), len(tokens) - offset)
    return next((i for i in range(longest) if run[i] != tokens[offset + i]), longest)
