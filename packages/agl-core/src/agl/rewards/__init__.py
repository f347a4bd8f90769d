"""Rewards as a library: scorers, and what combines them.

A scorer is a function `(task, answer, rollout)`, or of the first of these, sync or async. It returns a number, parts as
`{name: number}`, or None: the reward is missing. An error of a scorer also means that the reward is missing.
`rollout` has `rollout_id`, `group_id` and `mode`. A mapping `{name: scorer}` is a scorer whose parts have these names.
"""

from agl.rewards.combinators import Cached, Clip, Gate, Normalise, Sequential, Weighted
from agl.rewards.remote import Remote
from agl.rewards.score import Parts, Score, read_score, scored

__all__ = [
    "Cached",
    "Clip",
    "Gate",
    "Normalise",
    "Parts",
    "Remote",
    "Score",
    "Sequential",
    "Weighted",
    "read_score",
    "scored",
]
