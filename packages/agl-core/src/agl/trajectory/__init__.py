"""Trajectories: the spans of a rollout as training rows."""

from agl.tokens.drift import Difference, Drift
from agl.trajectory.call import Branch, Call
from agl.trajectory.drop import ADVICE, Drop, DropReason, sampling_fault
from agl.trajectory.join import SpanTree
from agl.trajectory.reward import Reward
from agl.trajectory.row import Row, Turn
from agl.trajectory.sampled import Decision, Sampled, SamplingReason, read_sampled
from agl.trajectory.trained import Trained, collect_trained, late_rewards, trained_span
from agl.trajectory.trajectory import Trajectory, build_trajectory

__all__ = [
    "ADVICE",
    "Branch",
    "Call",
    "Decision",
    "Difference",
    "Drift",
    "Drop",
    "DropReason",
    "Reward",
    "Row",
    "Sampled",
    "SamplingReason",
    "SpanTree",
    "Trained",
    "Trajectory",
    "Turn",
    "build_trajectory",
    "collect_trained",
    "late_rewards",
    "read_sampled",
    "sampling_fault",
    "trained_span",
]
