"""Settings shared by both trainers of `benchmarks.single_turn`. TRL's environment has none of our packages."""

from dataclasses import dataclass

GROUPS, GROUP_SIZE = 4, 8
LEARNING_RATE, MAX_TOKENS = 5e-4, 48
WEIGHTS = {"syntax": 0.3, "efficiency": 0.4, "goal": 0.3}
"""Weights of the dimensions of the reward."""


@dataclass(frozen=True, slots=True)
class Took:
    """Time of a training, from its first sample to its last optimizer step."""

    wall_s: float
    cpu_s: float
