"""Evidence for a difference between the arms of a canary, which may be looked at any time.

An e-process is the wealth of a bettor who starts with 1 and bets, before each difference is seen, that it is positive:
K = product of (1 + stake_i * difference_i). If the differences have no positive mean given the past, K has no positive
drift, and P(K ever reaches 1 / alpha) <= alpha (Ville's inequality). So a decision may be taken at the first moment at
which K is large enough, however often somebody looks (Waudby-Smith and Ramdas, arXiv 2010.09686).
"""

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

STAKES: Final = (0.15, 0.3, 0.6)
"""Shares of the largest stake at which K stays positive. One unit of wealth is divided evenly among these constant
bets, which amounts to one bet that follows what has paid so far: small differences need small stakes."""


class Outcome(NamedTuple):
    """A value of one rollout, in [0, 1], and the share of rollouts that the candidate gets at its time."""

    is_candidate: bool
    value: float
    fraction: float


def differences(outcomes: Iterable[Outcome]) -> Iterator[float]:
    """Mean of the candidate's next rollouts minus that of the current version's, for blocks as they come.

    At a fraction of 0.1 a block has one rollout of the candidate and nine of the current version. Each rollout is in
    one block at most: a difference that shares rollouts with an earlier one would not be independent of it. If the
    fraction changes, new blocks begin.
    """
    waiting: tuple[list[float], list[float]] = ([], [])
    sizes, last = (1, 1), 0.0
    for is_candidate, value, fraction in outcomes:
        if fraction != last:
            waiting, last = ([], []), fraction
            sizes = max(1, round((1 - fraction) / fraction)), max(1, round(fraction / (1 - fraction)))
        waiting[is_candidate].append(value)
        if len(waiting[0]) >= sizes[0] and len(waiting[1]) >= sizes[1]:
            current, candidate = (sum(arm[:size]) / size for arm, size in zip(waiting, sizes, strict=True))
            for arm, size in zip(waiting, sizes, strict=True):
                del arm[:size]
            yield candidate - current


def wealth(gains: Iterable[float], worst: float = 1.0) -> Iterator[float]:
    """K after each of `gains`, none of which is below -`worst`; large if their mean is positive."""
    bets = [stake / worst for stake in STAKES]
    held = [1.0 / len(bets)] * len(bets)
    for gain in gains:
        held = [value * (1 + bet * gain) for value, bet in zip(held, bets, strict=True)]
        yield sum(held)
