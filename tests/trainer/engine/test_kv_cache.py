"""The engine's KV cache: the prefix tree of prompts and the slots of running sequences."""

from dataclasses import dataclass, field

import torch
from hypothesis import given
from hypothesis import strategies as st

from agl_trainer.engine.local.prefix_tree import KvShape, PrefixNode, PrefixTree
from agl_trainer.engine.local.slot_cache import SlotCache

SHAPE = KvShape(layers=2, kv_heads=1, head_dim=1, dtype=torch.float32, device=torch.device("cpu"))
PROMPTS = st.lists(st.integers(0, 2), max_size=9)
"""Few token ids, so that prompts share prefixes of every length; the empty one too (a prompt of one token)."""
INSERT = st.tuples(st.just("insert"), PROMPTS)
RELEASE = st.tuples(st.just("release"), st.integers(0, 100))
SHRINK = st.tuples(st.just("shrink"), st.integers(0, 30))
COMPUTE = st.tuples(st.just("compute"), st.none())


def value_of(prefix: list[int]) -> float:
    """A number that is unique to `prefix`, in place of the keys and values of its last token."""
    return float(sum((token + 1) * 4**place for place, token in enumerate(prefix)))


def compute(tree: PrefixTree) -> None:
    """Compute pending nodes, as a prefill does."""
    for node in tree.nodes():
        if node.pending:
            before = [token for above in node.path()[:-1] for token in above.tokens]
            for place in range(len(node.tokens)):
                node.kv[..., place, :] = value_of(before + node.tokens[: place + 1])
            node.pending = False


def check_path(tree: PrefixTree, node: PrefixNode, prompt: list[int]) -> None:
    """Assert that the path of `node` is in the tree and spells `prompt`, with the values of its tokens."""
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
class InsertedPrompts:
    """A tree and the prompts in use."""

    tree: PrefixTree = field(default_factory=lambda: PrefixTree(SHAPE))
    leaves: list[tuple[PrefixNode, list[int]]] = field(default_factory=list)

    def insert(self, prompt: list[int]) -> None:
        self.leaves.append((self.tree.insert(prompt), prompt))

    def release(self, which: int) -> None:
        if self.leaves:
            self.tree.release(self.leaves.pop(which % len(self.leaves))[0])

    def shrink(self, size: int) -> None:
        self.tree.shrink(size)
        used = {tuple(prompt[:end]) for _, prompt in self.leaves for end in range(1, len(prompt) + 1)}
        # More than `size` tokens are left only if all of them are in use.
        assert self.tree.size <= max(size, len(used))

    def compute(self, _: None) -> None:
        compute(self.tree)


@given(st.lists(st.one_of(INSERT, INSERT, RELEASE, SHRINK, COMPUTE), max_size=40))
def test_prompts_in_use_stay_complete_while_others_are_added_and_removed(steps: list[tuple[str, object]]) -> None:
    prompts = InsertedPrompts()
    for verb, argument in steps:
        getattr(prompts, verb)(argument)
        check_tree(prompts.tree)
        for node, prompt in prompts.leaves:
            check_path(prompts.tree, node, prompt)


@given(st.lists(PROMPTS, min_size=1, max_size=10))
def test_a_shared_prefix_is_kept_once(prompts: list[list[int]]) -> None:
    tree = PrefixTree(SHAPE)
    for prompt in prompts:
        tree.insert(prompt)
    assert tree.size == len({tuple(prompt[:end]) for prompt in prompts for end in range(1, len(prompt) + 1)})


def test_computed_tokens_are_not_pending_again() -> None:
    tree = PrefixTree(SHAPE)
    tree.insert([1, 2, 3, 4])
    compute(tree)
    tree.insert([1, 2, 5])
    assert {tuple(node.tokens): node.pending for node in tree.nodes()} == {(1, 2): False, (3, 4): False, (5,): True}


def test_the_least_recently_used_leaf_is_removed_first() -> None:
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


def test_a_node_in_use_twice_is_kept_until_both_release_it() -> None:
    tree = PrefixTree(SHAPE)
    node = tree.insert([1, 2])
    assert tree.insert([1, 2]) is node
    tree.release(node)
    tree.shrink(0)
    assert tree.size == 2
    tree.release(node)
    tree.shrink(0)
    assert tree.size == 0


def test_a_path_is_split_after_the_last_shared_node() -> None:
    tree = PrefixTree(SHAPE)
    for prompt in ([1] * 8, [1] * 8 + [2, 2, 3], [1] * 8 + [2, 2, 4]):
        leaf = tree.insert(prompt)
    anchor, tail = leaf.split_path(lambda node: len(node.tokens) >= 4)
    assert (anchor.tokens, [node.tokens for node in tail]) == ([1] * 8, [[2, 2], [4]])
    assert leaf.split_path(lambda node: True) == (leaf, [])
    root, everything = leaf.split_path(lambda node: False)
    assert root is tree.root and everything == leaf.path()


def slot_rows(cache: SlotCache, slot: int, length: int) -> list[list[float]]:
    """Keys and values of each layer for the first `length` tokens of `slot`."""
    return [pair[slot, 0, :length, 0].tolist() for layer in cache.layers for pair in layer]


def numbered(tokens: int, first: int) -> PrefixNode:
    """A node whose keys and values are all different."""
    kv = torch.arange(first, first + 4 * tokens, dtype=torch.float32).view(2, 2, 1, tokens, 1)
    return PrefixNode(list(range(tokens)), kv, depth=0)


def test_a_slot_is_filled_moved_and_shortened() -> None:
    cache = SlotCache(SHAPE, slots=3)
    assert cache.fill(2, [numbered(2, first=0), numbered(1, first=100)]) == 3
    expected = [[0, 1, 100], [2, 3, 101], [4, 5, 102], [6, 7, 103]]
    assert slot_rows(cache, 2, 3) == expected
    cache.move(2, 0)
    assert slot_rows(cache, 0, 3) == expected
    assert slot_rows(cache, 1, 3) == [[0, 0, 0]] * 4
    cache.drop_first(2, 1, length=3)
    assert slot_rows(cache, 2, 2) == [row[1:] for row in expected]


def test_a_growing_cache_keeps_its_content_and_is_zero_elsewhere() -> None:
    cache = SlotCache(SHAPE, slots=2)
    cache.fill(1, [numbered(3, first=1)])
    before = slot_rows(cache, 1, 3)
    cache.reserve(33)
    capacity = cache.layers[0][0].shape[2]
    assert capacity == 64
    assert slot_rows(cache, 1, 64) == [row + [0.0] * 61 for row in before]
    cache.reserve(10)
    assert cache.layers[0][0].shape[2] == capacity
    assert cache.fill(0, [numbered(200, first=0)]) == 200
    assert slot_rows(cache, 0, 200)[0] == list(range(200))
