"""Sampling of production traffic: which rollouts the store keeps.

rule     the decision, as pure functions
sampler  decides the pending rollouts of a store, in a thread
undecided  what is pending, for people
"""

from agl.sampling.rule import Unit, decide, decide_in_window, window_threshold
from agl.sampling.sampler import KEEP_ALL, Sampler, sampling
from agl.sampling.undecided import Undecided

__all__ = ["KEEP_ALL", "Sampler", "Undecided", "Unit", "decide", "decide_in_window", "sampling", "window_threshold"]
