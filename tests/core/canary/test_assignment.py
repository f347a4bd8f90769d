"""The arm of a key: a worked hash, the share of keys, and a share that grows."""

import pytest

from agl.canary.assignment import hash_key, is_candidate


def test_a_key_is_hashed_with_the_canary_as_salt() -> None:
    assert hash_key("c", "user ann") == "c1d4d4d3176845"
    assert hash_key("d", "user ann") != hash_key("c", "user ann")
    assert hash_key("c", "\ud800")


def test_a_larger_fraction_takes_the_candidate_from_nobody() -> None:
    keys = [hash_key("c", f"user {number}") for number in range(2000)]
    shares = [{key for key in keys if is_candidate(key, fraction)} for fraction in (0.1, 0.3, 0.9)]
    assert shares[0] < shares[1] < shares[2]
    assert [len(share) / len(keys) for share in shares] == pytest.approx([0.1, 0.3, 0.9], abs=0.03)
    assert not is_candidate("00000000000001", 1e-18) and is_candidate("fffffffffffffe", 1 - 1e-17)
