"""Emitters: one short span each, a child of the current span, in the rollout and role in force.

They take `attributes` (more span attributes) last, return the span's id (16 hex digits, usable as the `target` of a
reward), and never raise into the agent: a value that a span cannot carry is logged, nothing is recorded, and None comes
back. In the tests of an agent set `AGL_STRICT=1`: then it is a TelemetryError. With no rollout active the span's trace
is the rollout.
"""

from agl.emit.annotation import emit_annotation
from agl.emit.exception import emit_exception
from agl.emit.message import emit_message
from agl.emit.object import emit_object
from agl.emit.observation import emit_observation
from agl.emit.operation import operation
from agl.emit.reward import emit_reward

__all__ = [
    "emit_annotation",
    "emit_exception",
    "emit_message",
    "emit_object",
    "emit_observation",
    "emit_reward",
    "operation",
]
