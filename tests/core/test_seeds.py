"""One seed derives all others: the same in every process, different for each purpose."""

from itertools import product

from agl.seeds import derive


def test_a_seed_is_the_first_31_bits_of_the_hash_of_its_purpose() -> None:
    """By hand: `printf '[0, "rollout", 3, 1]' | sha256sum` begins with 9145d63a; half of it."""
    assert derive(0, "rollout", 3, 1) == 1218636573


def test_each_seed_purpose_and_part_gives_another_seed() -> None:
    purposes = ("rollout", "evaluation", "call")
    parts: list[tuple[int | str, ...]] = [(), (0,), ("0",), (1,), (0, 1), ("01",), (10,), ("a", "b"), ("ab",)]
    found = [derive(seed, purpose, *own) for seed, purpose, own in product(range(-1, 50), purposes, parts)]
    assert len(set(found)) == len(found)
    assert all(0 <= seed < 2**31 for seed in found)
    assert 0.45 < sum(seed < 2**30 for seed in found) / len(found) < 0.55
