"""The evidence of a canary: worked numbers, what it may not bet on, and how often it is wrong."""

import random

import pytest

from agl.canary.evidence import STAKES, Outcome, differences, wealth


def outcomes(text: str, fraction: float) -> list[Outcome]:
    """`c1 k0` is a candidate's rollout that earned 1, and one of the current version that earned 0."""
    return [Outcome(word[0] == "c", float(word[1:]), fraction) for word in text.split()]


def test_a_block_has_as_many_rollouts_of_each_arm_as_the_fraction_brings() -> None:
    half = outcomes("c1 k0 k1 c1 k1 c0", 0.5)
    assert list(differences(half)) == [1, 0, -1]
    assert list(differences(outcomes("k1 k0 c1 k0 c1 k1 k0 k0", 0.25))) == [pytest.approx(1 - 1 / 3)] * 2
    assert list(differences(outcomes("c1 c0 c1 k0 c1", 0.75))) == [pytest.approx(2 / 3)]


def test_no_rollout_is_in_two_blocks_and_a_new_fraction_begins_new_ones() -> None:
    rare = outcomes("c1 c1 c1 k0", 0.5)
    assert list(differences(rare)) == [1]
    assert list(differences([*rare, *outcomes("k1 k1 k1 c0", 0.25)])) == [1, -1]


def test_wealth_is_the_mean_product_of_constant_bets() -> None:
    assert STAKES == (0.15, 0.3, 0.6)
    assert list(wealth([1.0, -0.5])) == [
        pytest.approx((1.15 + 1.3 + 1.6) / 3),
        pytest.approx((1.15 * 0.925 + 1.3 * 0.85 + 1.6 * 0.7) / 3),
    ]
    assert list(wealth([-0.05], worst=0.05)) == [pytest.approx((0.85 + 0.7 + 0.4) / 3)]
    assert min(wealth([-1.0] * 100)) > 0


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("sign", [1, -1])
def test_equal_arms_seldom_give_evidence_however_often_one_looks(fraction: float, sign: int) -> None:
    """Ville: at most 5 % of the runs ever reach 20. Of 200 runs more than 19 would be one in 500."""
    draw = random.Random(7).random
    wrong = 0
    for _ in range(200):
        run = (Outcome(draw() < fraction, float(draw() < 0.5), fraction) for _ in range(1000))
        wrong += any(held >= 20 for held in wealth(sign * gain for gain in differences(run)))
    assert wrong <= 19
