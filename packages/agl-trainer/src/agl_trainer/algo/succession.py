"""Succession: how many hand-offs and calls come after a call, along what followed what.

Call B follows call A if A had ended when B started, unless their branches ran side by side. These are the children of
the lowest common ancestor span of A and B that contain them; two branches ran side by side if each began before the
first call in the other ended. So the order in which concurrent calls happen to run changes nothing.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from agl.trajectory import Branch, Call


class Distance(NamedTuple):
    """From a call to the reward: the most role changes, and the most calls, on any path of calls that follow it."""

    handoffs: int = 0
    calls: int = 0


def distances(calls: Sequence[Call]) -> list[Distance]:
    """The distance of each call, by dynamic programming from the last call: a follower always starts later."""
    first_ends: dict[Branch, int] = {}
    for call in calls:
        for branch in call.branches:
            first_ends[branch] = min(call.end_ns, first_ends.get(branch, call.end_ns))
    found: dict[str, Distance] = {}
    later: list[Call] = []
    for call in sorted(calls, key=lambda call: call.start_ns, reverse=True):
        best = Distance()
        for other in reversed(later):  # The nearest first: most of the others are then no farther from the reward.
            after = found[other.span_id]
            handoffs = after.handoffs + (other.role != call.role)
            farthest = Distance(max(best.handoffs, handoffs), max(best.calls, after.calls + 1))
            if farthest != best and _follows(other, call, first_ends):
                best = farthest
        found[call.span_id] = best
        later.append(call)
    return [found[call.span_id] for call in calls]


def _follows(call: Call, earlier: Call, first_ends: Mapping[Branch, int]) -> bool:
    # The second condition is for calls of no duration, which would follow each other.
    if earlier.end_ns > call.start_ns or earlier.start_ns == call.start_ns:
        return False
    shared = sum(one == other for one, other in zip(earlier.branches, call.branches, strict=False))
    if shared in (0, len(earlier.branches), len(call.branches)):
        return True  # They have no common ancestor, or one is within the other.
    one, other = earlier.branches[shared], call.branches[shared]
    return one.start_ns >= first_ends[other] or other.start_ns >= first_ends[one]
