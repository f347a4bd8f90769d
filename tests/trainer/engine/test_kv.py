"""What the engine keeps: prompts in a tree that is split, shared and shrunk, and the slab of running sequences."""

from dataclasses import dataclass, field

import torch
from hypothesis import given
from hypothesis import strategies as st

from agl_trainer.engine.local.kv import KvShape, PrefixNode, PrefixTree, Slab

SHAPE = KvShape(layers=2, heads=1, width=1, dtype=torch.float32, device=torch.device("cpu"))
PROMPTS = st.lists(st.integers(0, 2), max_size=9)
"""Few token ids, so that prompts share prefixes of every length; the empty one too (a prompt of one token)."""
INSERT = st.tuples(st.just("insert"), PROMPTS)
RELEASE = st.tuples(st.just("release"), st.integers(0, 100))
SHRINK = st.tuples(st.just("shrink"), st.integers(0, 30))
COMPUTE = st.tuples(st.just("compute"), st.none())


def value_of(prefix: list[int]) -> float:
    """A number for the token that ends `prefix`, different for all prefixes: stands for its keys and values."""
    return float(sum((token + 1) * 4**place for place, token in enumerate(prefix)))


def compute(tree: PrefixTree) -> None:
    """Fill what is pending, as a prefill does."""
    for node in tree.nodes():
        if node.pending:
            before = [token for above in node.path()[:-1] for token in above.tokens]
            for place in range(len(node.tokens)):
                node.kv[..., place, :] = value_of(before + node.tokens[: place + 1])
            node.pending = False


def check_path(tree: PrefixTree, node: PrefixNode, prompt: list[int]) -> None:
    """`node` ends the path of `prompt`, all of it is in the tree, and what is computed belongs to its tokens."""
    path = node.path()
    assert [token for part in path for token in part.tokens] == prompt
    assert set(map(id, path)) <= set(map(id, tree.nodes()))
    start = 0
    for part in path:
        assert part.depth == start
        assert part.kv.shape[3] == len(part.tokens)
        if not part.pending:
            values = [value_of(prompt[: start + place + 1]) for place in range(len(part.tokens))]
            assert torch.equal(part.kv[0, 0, 0, :, 0], torch.tensor(values))
        start += len(part.tokens)


def check_tree(tree: PrefixTree) -> None:
    nodes = list(tree.nodes())
    assert tree.size == sum(len(node.tokens) for node in nodes)
    for node in [tree.root, *nodes]:
        assert all(child.parent is node and child.tokens[0] == first for first, child in node.children.items())
    assert all(node.tokens for node in nodes)


@dataclass
class Held:
    """The prompts that callers hold."""

    tree: PrefixTree = field(default_factory=lambda: PrefixTree(SHAPE))
    leaves: list[tuple[PrefixNode, list[int]]] = field(default_factory=list)

    def insert(self, prompt: list[int]) -> None:
        self.leaves.append((self.tree.insert(prompt), prompt))

    def release(self, which: int) -> None:
        if self.leaves:
            self.tree.release(self.leaves.pop(which % len(self.leaves))[0])

    def shrink(self, size: int) -> None:
        self.tree.shrink(size)
        held = {tuple(prompt[:end]) for _, prompt in self.leaves for end in range(1, len(prompt) + 1)}
        # More than `size` is left only where all of it is in use.
        assert self.tree.size <= max(size, len(held))

    def compute(self, _: None) -> None:
        compute(self.tree)


@given(st.lists(st.one_of(INSERT, INSERT, RELEASE, SHRINK, COMPUTE), max_size=40))
def test_what_is_held_stays_whole_whatever_else_comes_and_goes(steps: list[tuple[str, object]]) -> None:
    held = Held()
    for verb, argument in steps:
        getattr(held, verb)(argument)
        check_tree(held.tree)
        for node, prompt in held.leaves:
            check_path(held.tree, node, prompt)


@given(st.lists(PROMPTS, min_size=1, max_size=10))
def test_a_shared_prefix_is_kept_once(prompts: list[list[int]]) -> None:
    tree = PrefixTree(SHAPE)
    for prompt in prompts:
        tree.insert(prompt)
    assert tree.size == len({tuple(prompt[:end]) for prompt in prompts for end in range(1, len(prompt) + 1)})


def test_what_is_computed_is_not_pending_again() -> None:
    tree = PrefixTree(SHAPE)
    tree.insert([1, 2, 3, 4])
    compute(tree)
    tree.insert([1, 2, 5])
    assert {tuple(node.tokens): node.pending for node in tree.nodes()} == {(1, 2): False, (3, 4): False, (5,): True}


def test_the_leaf_used_longest_ago_is_dropped_first() -> None:
    tree = PrefixTree(SHAPE)
    first, second, third = (tree.insert([7, token]) for token in (1, 2, 3))
    for node in (first, third, second):
        tree.release(node)
    again = tree.insert([7, 1])
    tree.release(again)
    tree.shrink(3)
    assert sorted(node.tokens[0] for node in tree.nodes() if not node.children) == [1, 2]
    tree.shrink(0)
    assert tree.size == 0


def test_a_node_that_two_hold_is_kept_until_both_let_go() -> None:
    tree = PrefixTree(SHAPE)
    node = tree.insert([1, 2])
    assert tree.insert([1, 2]) is node
    tree.release(node)
    tree.shrink(0)
    assert tree.size == 2
    tree.release(node)
    tree.shrink(0)
    assert tree.size == 0


def test_a_path_is_parted_at_the_last_shared_node() -> None:
    tree = PrefixTree(SHAPE)
    for prompt in ([1] * 8, [1] * 8 + [2, 2, 3], [1] * 8 + [2, 2, 4]):
        leaf = tree.insert(prompt)
    anchor, tail = leaf.split_path(lambda node: len(node.tokens) >= 4)
    assert (anchor.tokens, [node.tokens for node in tail]) == ([1] * 8, [[2, 2], [4]])
    assert leaf.split_path(lambda node: True) == (leaf, [])
    root, everything = leaf.split_path(lambda node: False)
    assert root is tree.root and everything == leaf.path()


def slab_row(slab: Slab, slot: int, length: int) -> list[list[float]]:
    """Keys and values of each layer in the first `length` places of `slot`."""
    return [pair[slot, 0, :length, 0].tolist() for layer in slab.layers for pair in layer]


def numbered(tokens: int, first: int) -> PrefixNode:
    """A node whose keys and values are all different."""
    kv = torch.arange(first, first + 4 * tokens, dtype=torch.float32).view(2, 2, 1, tokens, 1)
    return PrefixNode(list(range(tokens)), kv, depth=0)


def test_a_slot_is_filled_with_nodes_in_turn_moved_and_shortened() -> None:
    slab = Slab(SHAPE, slots=3)
    assert slab.fill(2, [numbered(2, first=0), numbered(1, first=100)]) == 3
    expected = [[0, 1, 100], [2, 3, 101], [4, 5, 102], [6, 7, 103]]
    assert slab_row(slab, 2, 3) == expected
    slab.move(2, 0)
    assert slab_row(slab, 0, 3) == expected
    assert slab_row(slab, 1, 3) == [[0, 0, 0]] * 4
    slab.forget(2, 1, kept=3)
    assert slab_row(slab, 2, 2) == [row[1:] for row in expected]


def test_a_slab_that_grows_keeps_what_it_holds_and_is_zero_elsewhere() -> None:
    slab = Slab(SHAPE, slots=2)
    slab.fill(1, [numbered(3, first=1)])
    before = slab_row(slab, 1, 3)
    slab.reserve(33)
    capacity = slab.layers[0][0].shape[2]
    assert capacity == 64
    assert slab_row(slab, 1, 64) == [row + [0.0] * 61 for row in before]
    slab.reserve(10)
    assert slab.layers[0][0].shape[2] == capacity
    assert slab.fill(0, [numbered(200, first=0)]) == 200
    assert slab_row(slab, 0, 200)[0] == list(range(200))
